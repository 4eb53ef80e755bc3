// gemm: out[t, h, r] (+)= weight[h, r] . x[t, h] for many tokens, on tensor cores, in bf16 with f32 sums.
//
//   grid (heads * ceil(rows / 64), ceil(tokens / 64)), 128 threads, 64 KB of dynamic shared memory
//
// A block makes 64 tokens x 64 rows, 256 values of k at a time: weights are decoded and activations rounded into two tiles
// of bf16, 16-byte chunk c of row i at c ^ (i & 7); a warp multiplies 32 tokens and 32 rows. What is beyond k, the last
// row or the last token is zeros.
//
// Defines: TYPE_ID (see blocks.cuh; 0 F32, 1 F16, 30 BF16)
#include "prims.cuh"
#include "blocks.cuh"

constexpr int THREADS = 128, TILE = 64, DEPTH = 256, CHUNKS = DEPTH / 8;
constexpr bool IS_FLOAT = TYPE_ID == 0 || TYPE_ID == 1 || TYPE_ID == 30;

DEVICE int chunk_at(int row, int c) { return row * CHUNKS + (c ^ (row & 7)); }

// 256 values of 64 weight rows from `row0` and column k0 on
DEVICE void load_weights(uint4* s_w, const u8* w, const Planes& planes, i64 first, int row0, int n_rows, int k0, int k) {
#if TYPE_ID == 0 || TYPE_ID == 1 || TYPE_ID == 30
  for (int e = threadIdx.x; e < TILE * CHUNKS; e += THREADS) {
    const int r = e / CHUNKS, c = e % CHUNKS, row = row0 + r, col = k0 + 8 * c;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < n_rows && col < k) {
      const i64 at = (first + row) * k + col;
#if TYPE_ID == 0
      const float4 a = __ldg((const float4*)w + at / 4), b = __ldg((const float4*)w + at / 4 + 1);
      v = make_uint4(pack2<BF16>(a.x, a.y), pack2<BF16>(a.z, a.w), pack2<BF16>(b.x, b.y), pack2<BF16>(b.z, b.w));
#else
      v = __ldg((const uint4*)w + at / 8);
#if TYPE_ID == 1
      auto two = [](u32 x) { return pack2<BF16>(f16_to_f32((u16)x), f16_to_f32((u16)(x >> 16))); };
      v = make_uint4(two(v.x), two(v.y), two(v.z), two(v.w));
#endif
#endif
    }
    s_w[chunk_at(r, c)] = v;
  }
#else
  constexpr int PER_ROW = DEPTH / (32 * GROUPS);  // steps
  const int n_blocks = k / BLOCK;
  for (int e = threadIdx.x; e < TILE * PER_ROW; e += THREADS) {
    const int r = e / PER_ROW, block_in = e % PER_ROW / STEPS, step = e % STEPS, row = row0 + r;
    const int block = k0 / BLOCK + block_in;
    Codes c;
    const bool ok = row < n_rows && block < n_blocks;
    if (ok) decode_step(c, planes, (first + row) * n_blocks + block, step);
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      const int chunk = (block_in * BLOCK + 32 * group_at(step, g)) / 8;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 p[4] = {0, 0, 0, 0};
        if (ok) {
          const float s = c.s[g][i / 2], m = c.m[g];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int four = c.v[g][2 * i + j / 2] >> 16 * (j % 2);
            p[j] = pack2<BF16>(s * (float)(signed char)four - m, s * (float)(signed char)(four >> 8) - m);
          }
        }
        s_w[chunk_at(r, chunk + i)] = make_uint4(p[0], p[1], p[2], p[3]);
      }
    }
  }
#endif
}

KERNEL(THREADS, 2, gemm)(
    const u8* __restrict__ w, i64 at_b, i64 at_c, i64 at_d, const float* __restrict__ x, i64 x_tok, i64 x_head,
    float* __restrict__ out, i64 out_tok, i64 out_head, int n_rows, int k, int n_tok, int accumulate) {
  DYN_SMEM(smem);
  uint4* s_x = smem;
  uint4* s_w = smem + TILE * CHUNKS;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int tiles = (n_rows + TILE - 1) / TILE, head = blockIdx.x / tiles;
  const int row0 = blockIdx.x % tiles * TILE, tok0 = blockIdx.y * TILE;
  const Planes planes = {w, w + at_b, w + at_c, w + at_d};
  const int wt = warp % 2 * 32, wr = warp / 2 * 32;  // this warp's tokens and rows
  x += head * x_head;
  out += head * out_head;
  saddr x_at[2][2], w_at[2];  // by half of 64 values, and of these the 16
#pragma unroll
  for (int u = 0; u < 2; u++) {
    for (int v = 0; v < 2; v++) x_at[u][v] = smem_addr(s_x + chunk_at(wt + (lane & 15), 4 * u + 2 * v + (lane >> 4)));
    w_at[u] = smem_addr(s_w + chunk_at(wr + (lane & 7), 4 * u + (lane >> 3)));
  }
  float acc[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;

  for (int k0 = 0; k0 < k; k0 += DEPTH) {
    for (int e = tid; e < TILE * CHUNKS; e += THREADS) {
      const int r = e / CHUNKS, c = e % CHUNKS, tok = tok0 + r, col = k0 + 8 * c;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (tok < n_tok && col < k) {
        const float4* from = (const float4*)(x + tok * x_tok + col);
        const float4 a = __ldg(from), b = __ldg(from + 1);
        v = make_uint4(pack2<BF16>(a.x, a.y), pack2<BF16>(a.z, a.w), pack2<BF16>(b.x, b.y), pack2<BF16>(b.z, b.w));
      }
      s_x[chunk_at(r, c)] = v;
    }
    load_weights(s_w, w, planes, (i64)head * n_rows, row0, n_rows, k0, k);
    __syncthreads();
#pragma unroll
    for (int g = 0; g < DEPTH / 64; g++)
#pragma unroll
      for (int u = 0; u < 2; u++) {
        u32 a[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int v = 0; v < 2; v++) ldsm_x4(a[i][v], x_at[u][v] + g * 128 + i * (16 * CHUNKS * 16));
#pragma unroll
        for (int j = 0; j < 4; j++) {
          u32 b[4];
          ldsm_x4(b, w_at[u] + g * 128 + j * (8 * CHUNKS * 16));
#pragma unroll
          for (int i = 0; i < 2; i++) {
            mma16816<BF16>(acc[i][j], a[i][0], b[0], b[1]);
            mma16816<BF16>(acc[i][j], a[i][1], b[2], b[3]);
          }
        }
      }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int tok = tok0 + wt + 16 * i + (lane >> 2) + 8 * (e >> 1), row = row0 + wr + 8 * j + 2 * (lane & 3) + (e & 1);
        if (tok < n_tok && row < n_rows) {
          float* to = out + tok * out_tok + row;
          *to = accumulate ? *to + acc[i][j][e] : acc[i][j][e];
        }
      }
}
