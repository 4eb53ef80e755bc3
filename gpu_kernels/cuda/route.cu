// route: which experts a token goes to, and with what weights.
//
//   grid (tokens), 32 threads, 8 (n_expert + n_group) bytes
//
// probs = softmax or sigmoid of the logits; chosen by probs + bias, within the best groups (by the sum of their two best);
// weighted by probs. Of equals the lower index.
#include "prims.cuh"
#include "reduce.cuh"

// the index of the largest of n values, the first of equals; 0 if all are -inf
DEVICE int warp_argmax(const float* v, int n) {
  float best = NEG_INF;
  int at = 0x7fffffff;
  for (int e = threadIdx.x; e < n; e += 32)
    if (v[e] > best) {
      best = v[e];
      at = e;
    }
  for (int d = 16; d; d >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, best, d);
    const int other_at = __shfl_xor_sync(0xffffffffu, at, d);
    if (other > best || (other == best && other_at < at)) {
      best = other;
      at = other_at;
    }
  }
  return at < n ? at : 0;
}

KERNEL(32, 1, route)(
    const float* __restrict__ logits, i64 logits_tok, const float* __restrict__ bias, int is_softmax, int n_expert,
    int n_group, int n_group_used, int n_used, int norm, float min_sum, float scale, int* __restrict__ ids,
    float* __restrict__ weights) {
  DYN_SMEM(smem);
  float* probs = (float*)smem;
  float* select = probs + n_expert;
  float* groups = select + n_expert;
  float* taken = groups + n_group;
  const int lane = threadIdx.x;
  logits += blockIdx.x * logits_tok;
  ids += (i64)blockIdx.x * n_used;
  weights += (i64)blockIdx.x * n_used;
  float top = NEG_INF, total = 0.f;
  for (int e = lane; e < n_expert; e += 32) top = fmaxf(top, logits[e]);
  top = warp_max(top);
  for (int e = lane; e < n_expert; e += 32) {
    const float p = is_softmax ? expf(logits[e] - top) : 1.f / (1.f + expf(-logits[e]));
    probs[e] = p;
    total += p;
  }
  total = is_softmax ? warp_sum(total) : 1.f;
  for (int e = lane; e < n_expert; e += 32) {
    probs[e] = probs[e] / total;
    select[e] = bias ? probs[e] + bias[e] : probs[e];
  }
  __syncthreads();
  if (n_group > 1) {
    const int size = n_expert / n_group;
    for (int g = lane; g < n_group; g += 32) {
      float first = NEG_INF, second = NEG_INF;
      for (int e = g * size; e < g * size + size; e++) {
        const float s = select[e];
        if (s > first) {
          second = first;
          first = s;
        } else if (s > second) {
          second = s;
        }
      }
      groups[g] = size > 1 ? first + second : first;
      taken[g] = 0.f;
    }
    __syncthreads();
    for (int i = 0; i < n_group_used; i++) {  // the best groups are taken, by a mark that no sum has
      const int g = warp_argmax(groups, n_group);
      __syncthreads();
      if (lane == 0) groups[g] = NEG_INF;
      __syncthreads();
      if (lane == 0) taken[g] = 1.f;
    }
    __syncthreads();
    for (int e = lane; e < n_expert; e += 32)
      if (taken[e / size] == 0.f) select[e] = NEG_INF;
    __syncthreads();
  }
  float sum = 0.f;
  for (int i = 0; i < n_used; i++) {
    const int e = warp_argmax(select, n_expert);
    sum += probs[e];
    __syncthreads();
    if (lane == 0) {
      ids[i] = e;
      weights[i] = probs[e];
      select[e] = NEG_INF;
    }
    __syncthreads();
  }
  const float factor = norm ? scale / fmaxf(sum, min_sum) : scale;
  if (lane == 0)
    for (int i = 0; i < n_used; i++) weights[i] *= factor;
}
