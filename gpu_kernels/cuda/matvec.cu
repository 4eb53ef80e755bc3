// matvec: out[t, h, r] (+)= weight[h, r] . x[t, h] for a few tokens; a weight is read and decoded once for TOKENS of them.
//
//   grid (ceil(rows / rows a block), heads * ceil(tokens / tokens a block)), 128 threads: `lanes` threads a row, so
//   128 / lanes rows a block
//
// Quantised weights meet int8 activations (quantise.cu) in dp4a, 32 values at a time: with a minimum m of 16, the sum
// of the activations is subtracted m times. F32, F16 and BF16 meet f32. What a thread adds up does not depend on TOKENS.
//
// With ids (int32), a head is a slot: its weight is that of expert ids[h], its x is row h / slots_per_x, and n_tok is 1.
//
// Defines: TYPE_ID (see blocks.cuh; 0 F32, 1 F16, 30 BF16) TOKENS
#include "prims.cuh"
#include "blocks.cuh"

constexpr bool IS_FLOAT = TYPE_ID == 0 || TYPE_ID == 1 || TYPE_ID == 30;

// acc[t] += step e of a row times its part of x
DEVICE void add_step(
    float (&acc)[TOKENS], const u8* w, const Planes& planes, i64 row, int k, int e, const u8* const (&x)[TOKENS],
    const uint2* const (&scales)[TOKENS]) {
#if TYPE_ID == 0 || TYPE_ID == 1 || TYPE_ID == 30
  float v[8];
#if TYPE_ID == 0
  const float4* from = (const float4*)w + (row * k + 8 * e) / 4;
  const float4 a = __ldg(from), b = __ldg(from + 1);
  v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
  v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
#else
  const uint4 a = __ldg((const uint4*)w + (row * k + 8 * e) / 8);
  const u32 two[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u16 h = (u16)(two[i / 2] >> 16 * (i % 2));
    v[i] = TYPE_ID == 1 ? f16_to_f32(h) : bf16_to_f32(h);
  }
#endif
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float4* from_x = (const float4*)x[t] + 2 * e;
    const float4 p = __ldg(from_x), q = __ldg(from_x + 1);
    acc[t] += v[0] * p.x + v[1] * p.y + v[2] * p.z + v[3] * p.w + v[4] * q.x + v[5] * q.y + v[6] * q.z + v[7] * q.w;
  }
#else
  const int n_blocks = k / BLOCK, block = e / STEPS, step = e % STEPS;
  Codes c;
  decode_step(c, planes, row * n_blocks + block, step);
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const int at = block * (BLOCK / 32) + group_at(step, g);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int4* from = (const int4*)x[t] + 2 * at;
      const int4 p = __ldg(from), q = __ldg(from + 1);
      const uint2 of_x = __ldg(scales[t] + at);
      const float scale = __int_as_float(of_x.x);
      int a = __dp4a(c.v[g][0], p.x, 0), b = __dp4a(c.v[g][4], q.x, 0);
      a = __dp4a(c.v[g][1], p.y, a);
      b = __dp4a(c.v[g][5], q.y, b);
      a = __dp4a(c.v[g][2], p.z, a);
      b = __dp4a(c.v[g][6], q.z, b);
      a = __dp4a(c.v[g][3], p.w, a);
      b = __dp4a(c.v[g][7], q.w, b);
      acc[t] += scale * (c.s[g][0] * (float)a + c.s[g][1] * (float)b);
      if (HAS_MINIMUM) acc[t] -= scale * (c.m[g][0] * (float)(short)of_x.y + c.m[g][1] * (float)((int)of_x.y >> 16));
    }
  }
#endif
}

KERNEL(128, 1, matvec)(
    const u8* __restrict__ w, i64 at_b, i64 at_c, i64 at_d, const u8* __restrict__ x, i64 x_tok, i64 x_head,
    const uint2* __restrict__ scales, float* __restrict__ out, i64 out_tok, i64 out_head, int n_rows, int k, int n_tok,
    int n_head, int lanes, int accumulate, int tokens_a_block, const int* __restrict__ ids, int slots_per_x) {
  const int tid = threadIdx.x, mine = tid & (lanes - 1), row = blockIdx.x * (128 / lanes) + tid / lanes;
  const int head = blockIdx.y % n_head, first = blockIdx.y / n_head * tokens_a_block;
  const int last = min(first + tokens_a_block, n_tok), n_steps = IS_FLOAT ? k / 8 : k / BLOCK * STEPS;
  const int matrix = ids ? ids[head] : head, head_x = ids ? head / slots_per_x : head;
  const bool ok = row < n_rows;
  const i64 from_row = (i64)matrix * n_rows + (ok ? row : n_rows - 1);
  const Planes planes = {w, w + at_b, w + at_c, w + at_d};
  for (int t0 = first; t0 < last; t0 += TOKENS) {
    float acc[TOKENS];
    const u8* of_x[TOKENS];
    const uint2* of_scales[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int token = min(t0 + t, last - 1);
      acc[t] = 0.f;
      of_x[t] = x + token * x_tok + head_x * x_head;  // in bytes
      of_scales[t] = scales + ((i64)token * n_head + head_x) * (k / 32);
    }
#pragma unroll(TOKENS == 1 ? 2 : 1)
    for (int e = mine; e < n_steps; e += lanes) add_step(acc, w, planes, from_row, k, e, of_x, of_scales);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float v = acc[t];
      for (int d = lanes / 2; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
      if (mine == 0 && ok && t0 + t < last) {
        float* to = out + (t0 + t) * out_tok + head * out_head + row;
        *to = accumulate ? *to + v : v;
      }
    }
  }
}
