// widen_weights: a weight (heads, rows, k) of any type as the 16-bit values that expand.cu multiplies; f32 for q8.
//
//   grid (ceil(heads * rows * steps of a row / 128)), 128 threads; a thread takes one step of a row
//   out (heads, rows, k), or, transposed, (heads, k, rows): then neighbours take the same step of neighbouring rows
//
// Defines: TYPE_ID (see blocks.cuh; 0 F32, 1 F16, 30 BF16) TYPE_K (0 f16, 1 bf16, 2 q8)
#include "prims.cuh"
#include "blocks.cuh"

#if TYPE_K == 2
typedef float Out;
#else
typedef u16 Out;
#endif
constexpr bool IS_FLOAT = TYPE_ID == 0 || TYPE_ID == 1 || TYPE_ID == 30;

DEVICE void put(Out* p, float v) {
#if TYPE_K == 2
  *p = v;
#else
  *p = TYPE_K == 0 ? f32_to_f16(v) : f32_to_bf16(v);
#endif
}
DEVICE void put_8(Out* p, const float* v) {
#if TYPE_K == 2
  ((float4*)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  ((float4*)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
#elif TYPE_K == 1
  *(uint4*)p = make_uint4(pack2<BF16>(v[0], v[1]), pack2<BF16>(v[2], v[3]), pack2<BF16>(v[4], v[5]), pack2<BF16>(v[6], v[7]));
#else
  *(uint4*)p = make_uint4(pack2<F16>(v[0], v[1]), pack2<F16>(v[2], v[3]), pack2<F16>(v[4], v[5]), pack2<F16>(v[6], v[7]));
#endif
}

KERNEL(128, 1, widen_weights)(
    const u8* __restrict__ w, i64 at_b, i64 at_c, i64 at_d, Out* __restrict__ out, int n_head, int n_rows, int k,
    int transposed) {
  const int steps = IS_FLOAT ? k / 32 : k / BLOCK * STEPS, e = blockIdx.x * 128 + threadIdx.x;
  if (e >= n_head * n_rows * steps) return;
  const int head = e / (n_rows * steps), row = transposed ? e % n_rows : e / steps % n_rows;
  const int step = transposed ? e / n_rows % steps : e % steps;
  const i64 from_row = (i64)head * n_rows + row;
#if TYPE_ID != 0 && TYPE_ID != 1 && TYPE_ID != 30
  const Planes planes = {w, w + at_b, w + at_c, w + at_d};
  Codes c;
  decode_step(c, planes, from_row * (k / BLOCK) + step / STEPS, step % STEPS);
#endif
#pragma unroll
  for (int g = 0; g < (IS_FLOAT ? 1 : GROUPS); g++) {
    const int col = IS_FLOAT ? 32 * step : step / STEPS * BLOCK + 32 * group_at(step % STEPS, g);
    float v[32];
#pragma unroll
    for (int i = 0; i < 32; i++) {
#if TYPE_ID == 0
      v[i] = ((const float*)w)[from_row * k + col + i];
#elif TYPE_ID == 1
      v[i] = f16_to_f32(((const u16*)w)[from_row * k + col + i]);
#elif TYPE_ID == 30
      v[i] = bf16_to_f32(((const u16*)w)[from_row * k + col + i]);
#else
      v[i] = c.s[g][i / 16] * (float)(signed char)(c.v[g][i / 4] >> 8 * (i % 4)) - c.m[g][i / 16];
#endif
    }
    if (transposed) {
#pragma unroll
      for (int i = 0; i < 32; i++) put(out + ((i64)head * k + col + i) * n_rows + row, v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 32; i += 8) put_8(out + from_row * k + col + i, v + i);
    }
  }
}
