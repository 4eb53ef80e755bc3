// add_slots: out[t] += sum over the slots s of token t, in the order of choice, of weight[t, s] * slots[t, s]
//
//   grid (ceil(n / 256), tokens), 256 threads
#include "prims.cuh"

KERNEL(256, 1, add_slots)(
    const float* __restrict__ slots, const float* __restrict__ weights, int n_used, float* __restrict__ out, i64 out_tok,
    int n) {
  const int i = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
  if (i >= n) return;
  float sum = 0.f;
  for (int s = 0; s < n_used; s++) sum += weights[t * n_used + s] * slots[((i64)t * n_used + s) * n + i];
  out[t * out_tok + i] += sum;
}
