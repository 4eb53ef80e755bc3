// add_splits: out[t, h] (+)= the sum of the splits' outs, in their order.
//
//   grid (ceil(n / 256), tokens * heads), 256 threads; parts (splits, tokens * heads, n)
#include "prims.cuh"

KERNEL(256, 1, add_splits)(
    const float* __restrict__ parts, int n_splits, float* __restrict__ out, i64 out_tok, i64 out_head, int n_head, int n,
    int accumulate) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int s = 0; s < n_splits; s++) sum += parts[((i64)s * gridDim.y + blockIdx.y) * n + i];
  float* to = out + blockIdx.y / n_head * out_tok + blockIdx.y % n_head * out_head + i;
  *to = accumulate ? *to + sum : sum;
}
