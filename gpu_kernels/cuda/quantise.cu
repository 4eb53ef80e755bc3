// Activations in int8: of every 32 values, scale = max |x| / 127 and q = round(x / scale).
//
//   grid (ceil(k / 256), rows), 256 threads; a warp takes 32 values
//   q (rows, k) int8; scales (rows, k / 32) of (scale, scale * sum of q)
#include "prims.cuh"
#include "reduce.cuh"

KERNEL(256, 1, quantise)(
    const float* __restrict__ x, i64 x_tok, i64 x_head, int n_head, int k, signed char* __restrict__ q,
    float2* __restrict__ scales) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i / 32 * 32 >= k) return;  // a whole warp
  const float v = x[blockIdx.y / n_head * x_tok + blockIdx.y % n_head * x_head + i];
  const float top = warp_max(fabsf(v));
  const float code = top > 1e-30f ? rintf(v * (127.f / top)) : 0.f;
  const float sum = warp_sum(code), scale = top > 1e-30f ? top / 127.f : 0.f;
  q[(i64)blockIdx.y * k + i] = (signed char)(int)code;
  if (i % 32 == 0) scales[((i64)blockIdx.y * k + i) / 32] = make_float2(scale, scale * sum);
}
