// Activations as products take them: in int8 for a few tokens, in 16 bits for many.
//
//   quantise  grid (ceil(k / 256), rows), 256 threads; a warp takes 32 values, scale = max |x| / 127, q = round(x / scale)
//             q (rows, k) int8; scales (rows, k / 32) of (scale as a float; sums of q, of 16 values each, as two int16)
//   narrow    grid (rows, ceil(k_out / 2048)), 256 threads; a thread takes 8 values
//             out (rows, k_out) bf16, or f16 up to its largest value; zeros from k on
#include "prims.cuh"
#include "reduce.cuh"
#include "narrow.cuh"

KERNEL(256, 1, quantise)(
    const float* __restrict__ x, i64 x_tok, i64 x_head, int n_head, int k, signed char* __restrict__ q,
    uint2* __restrict__ scales) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i / 32 * 32 >= k) return;  // a whole warp
  const float v = x[blockIdx.y / n_head * x_tok + blockIdx.y % n_head * x_head + i];
  const float top = warp_max(fabsf(v));
  const float code = top > 1e-30f ? rintf(v * (127.f / top)) : 0.f;
  const float scale = top > 1e-30f ? top / 127.f : 0.f;
  int sum = (int)code;
  for (int d = 8; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  const int other = __shfl_xor_sync(0xffffffffu, sum, 16);
  q[(i64)blockIdx.y * k + i] = (signed char)(int)code;
  if (i % 32 == 0) scales[((i64)blockIdx.y * k + i) / 32] = uint2{__float_as_uint(scale), (sum & 0xffff) | (u32)other << 16};
}

KERNEL(256, 1, narrow)(
    const float* __restrict__ x, i64 x_tok, i64 x_head, int n_head, int k, u16* __restrict__ out, int k_out, int is_f16) {
  const int i = (blockIdx.y * 256 + threadIdx.x) * 8;
  if (i >= k_out) return;
  const float4* from = (const float4*)(x + blockIdx.x / n_head * x_tok + blockIdx.x % n_head * x_head + i);
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f), a = i < k ? from[0] : zero, b = i < k ? from[1] : zero;
  *(uint4*)(out + (i64)blockIdx.x * k_out + i) = narrow_8(a, b, is_f16);
}
