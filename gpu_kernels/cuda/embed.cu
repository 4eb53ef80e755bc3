// embed_rows: rows of a weight matrix as f32, the same bits as gguf's dequantiser.
//
//   grid (tokens), 128 threads
//
// Defines: TYPE_ID (0 F32, 1 F16, 30 BF16, or one of blocks.cuh)
#include "prims.cuh"
#include "blocks.cuh"

KERNEL(128, 1, embed_rows)(
    const u8* __restrict__ w, i64 at_b, i64 at_c, i64 at_d, const int* __restrict__ tokens, float* __restrict__ out,
    i64 out_tok, int k) {
  const i64 row = tokens[blockIdx.x];
  out += blockIdx.x * out_tok;
#if TYPE_ID == 0
  for (int i = threadIdx.x; i < k; i += 128) out[i] = ((const float*)w)[row * k + i];
#elif TYPE_ID == 1
  for (int i = threadIdx.x; i < k; i += 128) out[i] = f16_to_f32(((const u16*)w)[row * k + i]);
#elif TYPE_ID == 30
  for (int i = threadIdx.x; i < k; i += 128) out[i] = bf16_to_f32(((const u16*)w)[row * k + i]);
#else
  const Planes planes = {w, w + at_b, w + at_c, w + at_d};
  const int n_blocks = k / BLOCK;
  for (int e = threadIdx.x; e < n_blocks * STEPS; e += 128) {
    const int block = e / STEPS, step = e % STEPS;
    Codes c;
    decode_step(c, planes, row * n_blocks + block, step);
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      float* to = out + block * BLOCK + 32 * group_at(step, g);
#pragma unroll
      for (int i = 0; i < 32; i++) {
        const float code = (float)(signed char)(c.v[g][i / 4] >> 8 * (i % 4));
        to[i] = __fadd_rn(__fmul_rn(c.s[g][i / 16], code), -c.m[g][i / 16]);
      }
    }
  }
#endif
}
