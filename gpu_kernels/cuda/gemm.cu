// gemm: out[t, h, r] (+)= weight[h, r] . x[t, h] for many tokens, on tensor cores, with f32 sums.
//
//   grid (token tiles * ceil(rows / ROWS) * heads), token tiles first so that a weight's readers run together;
//   32 * WARPS_T * WARPS_R threads; dynamic shared memory: STAGES tiles of x, two of weights (STAGES if they are copied
//   as they are), TOKENS * 4 bytes
//
// A block makes TOKENS x ROWS, DEPTH values of k a stage. x is 16 bits wide (quantise.cu: narrow), its rows filled up with
// zeros to a multiple of 128, and comes by cp.async, STAGES - 1 stages ahead. Weights of the next stage are loaded to
// registers before this stage is multiplied, and written as 16-bit values between its last products: a thread's share
// is a unit, 64 values of a row. One barrier a stage.
//
// A tile is of units: 64 values of each row, 128 bytes, 16-byte chunk c of row r at c ^ (r & 7). The values of a unit
// are those of one step of blocks.cuh, or of two; where a step is not contiguous, x is fetched in its order.
// Tokens beyond the last are zeros. Beyond the last row or k, a valid place is read again: it meets zeros or is not stored.
//
// With tiles (int4: matrix, first and last position, 0), a token tile takes its matrix and its positions from there; an
// empty one ends at once. The x of position p is then row gather[p] / per (null: p), and out's row is p.
//
// Defines: TYPE_ID (see blocks.cuh; 1 F16, 30 BF16) F16_PRODUCTS (0: bf16) TOKENS ROWS WARPS_T WARPS_R DEPTH STAGES
#include "prims.cuh"
#include "blocks.cuh"

#if F16_PRODUCTS
typedef F16 T;
#else
typedef BF16 T;
#endif
constexpr bool IS_FLOAT = TYPE_ID == 1 || TYPE_ID == 30, COPIED = TYPE_ID == (F16_PRODUCTS ? 1 : 30);
constexpr int THREADS = 32 * WARPS_T * WARPS_R, UNITS = DEPTH / 64;
constexpr int W_STAGES = COPIED ? STAGES : 2, X_CHUNKS = TOKENS * DEPTH / 8, W_CHUNKS = ROWS * DEPTH / 8;
constexpr int M = TOKENS / WARPS_T / 16, N = ROWS / WARPS_R / 16, K = DEPTH / 16;  // a warp's products: 16 each way
static_assert(ROWS * UNITS == THREADS, "a thread has one unit");

// where group g (of 32 values) of a unit begins in its row
DEVICE int column(int unit, int g) {
  if (IS_FLOAT) return 64 * unit + 32 * g;
  const int step = unit * (2 / GROUPS) + g / GROUPS;
  return step / STEPS * BLOCK + 32 * group_at(step % STEPS, g % GROUPS);
}
DEVICE int chunk_at(int row, int c) { return row * 8 + (c ^ (row & 7)); }

// A thread's share of a stage of weights.
#if TYPE_ID == 1 || TYPE_ID == 30
struct Share { uint4 v[4]; };  // of half a unit's rows: 16-byte chunk tid % 8 of each, so that neighbours read one row

DEVICE void fetch(
    Share& s, const u8* w, const Planes&, i64 first, int row0, int n_rows, int k, int stage, int half) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int e = threadIdx.x / 8 + (4 * half + i) * (THREADS / 8), row = min(row0 + e % ROWS, n_rows - 1);
    const int col = min(64 * (stage * UNITS + e / ROWS) + 8 * (int)(threadIdx.x % 8), k - 8);
    s.v[i] = __ldg((const uint4*)((const u16*)w + (first + row) * k + col));
  }
}
DEVICE void put(uint4* s_w, const Share& s, int i) {
  auto two = [](u32 x) {
    return TYPE_ID == 1 ? pack2<T>(f16_to_f32((u16)x), f16_to_f32((u16)(x >> 16)))
                        : pack2<T>(bf16_to_f32((u16)x), bf16_to_f32((u16)(x >> 16)));
  };
  const uint4 v = s.v[i % 4];
  s_w[chunk_at(threadIdx.x / 8 + i * (THREADS / 8), threadIdx.x % 8)] = make_uint4(two(v.x), two(v.y), two(v.z), two(v.w));
}
#else
struct Share { Codes c[2 / GROUPS]; };  // unit tid / ROWS of row tid % ROWS: neighbours write to different banks

DEVICE void fetch(
    Share& s, const u8*, const Planes& planes, i64 first, int row0, int n_rows, int k, int stage, int half) {
  if (half) return;  // a step is decoded at once
  const int row = min(row0 + (int)threadIdx.x % ROWS, n_rows - 1), unit = stage * UNITS + threadIdx.x / ROWS;
  const int n_blocks = k / BLOCK;
#pragma unroll
  for (int i = 0; i < 2 / GROUPS; i++) {
    const int step = unit * (2 / GROUPS) + i;
    decode_step(s.c[i], planes, (first + row) * n_blocks + min(step / STEPS, n_blocks - 1), step % STEPS);
  }
}
DEVICE void put(uint4* s_w, const Share& s, int i) {  // chunk i of the unit
  const int of_step = i / 4 % GROUPS;
  const Codes& c = s.c[i / 4 / GROUPS];
  const float scale = c.s[of_step][i % 4 / 2], minimum = c.m[of_step];
  u32 p[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 four = (u32)c.v[of_step][i % 4 * 2 + j / 2] ^ 0x80808080u;
    const int at = j % 2 * 2;
    p[j] = pack2<T>(scale * byte_to_f32(four, at) - minimum, scale * byte_to_f32(four, at + 1) - minimum);
  }
  s_w[chunk_at(threadIdx.x, i)] = make_uint4(p[0], p[1], p[2], p[3]);
}
#endif

KERNEL(THREADS, 256 / THREADS, gemm)(
    const u8* __restrict__ w, i64 at_b, i64 at_c, i64 at_d, const u16* __restrict__ x, i64 x_tok, i64 x_head,
    float* __restrict__ out, i64 out_tok, i64 out_head, int n_rows, int k, int n_tok, int n_tiles, int accumulate,
    const int4* __restrict__ tiles, const int* __restrict__ gather, int per) {
  DYN_SMEM(smem);
  uint4* s_x = smem;
  uint4* s_w = smem + STAGES * X_CHUNKS;
  int* s_from = (int*)(s_w + W_STAGES * W_CHUNKS);  // rows of x
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int rest = blockIdx.x / n_tiles, tile = blockIdx.x % n_tiles, row_tiles = (n_rows + ROWS - 1) / ROWS;
  const int head = rest / row_tiles, row0 = rest % row_tiles * ROWS;
  int matrix = head, first = tile * TOKENS, last = min(first + TOKENS, n_tok);
  if (tiles) {
    const int4 t = __ldg(tiles + tile);
    matrix = t.x;
    first = t.y;
    last = t.z;
    if (first >= last) return;
  }
  for (int i = tid; i < TOKENS; i += THREADS) {
    const int p = first + i;
    s_from[i] = p >= last ? -1 : gather ? __ldg(gather + p) / per : p;
  }
  __syncthreads();
  x += head * x_head;
  out += head * out_head;
  const Planes planes = {w, w + at_b, w + at_c, w + at_d};
  const i64 first_row = (i64)matrix * n_rows;
  const int n_stages = (k + DEPTH - 1) / DEPTH;

  auto copy = [&](int stage) {
    const int slot = stage % STAGES;
#pragma unroll
    for (int i = 0; i < X_CHUNKS / THREADS; i++) {
      const int e = tid + i * THREADS, c = e % 8, r = e / 8;  // chunk and row, unit after unit
      const int col = column(stage * UNITS + r / TOKENS, c / 4) + c % 4 * 8;
      const int from = s_from[r % TOKENS];
      cp_async16(smem_addr(s_x + slot * X_CHUNKS + chunk_at(r, c)), x + max(from, 0) * x_tok + col, from >= 0);
    }
    if (COPIED) {
#pragma unroll
      for (int i = 0; i < W_CHUNKS / THREADS; i++) {
        const int e = tid + i * THREADS, c = e % 8, r = e / 8, row = min(row0 + r % ROWS, n_rows - 1);
        const int col = min(64 * (stage * UNITS + r / ROWS) + 8 * c, k - 8);
        cp_async16(smem_addr(s_w + slot * W_CHUNKS + chunk_at(r, c)), (const u16*)w + (first_row + row) * k + col, true);
      }
    }
  };
  const int wt = warp % WARPS_T * (16 * M), wr = warp / WARPS_T * (16 * N);  // this warp's tokens and rows
  const saddr x_at = smem_addr(s_x + 8 * (wt + (lane & 15)));
  const saddr w_at = smem_addr(s_w + 8 * (wr + (lane & 7) + 8 * (lane >> 4)));
  int x_in[4], w_in[4];  // where a lane's chunk is in its row, by 16 values of a unit
#pragma unroll
  for (int q = 0; q < 4; q++) {
    x_in[q] = 16 * ((2 * q + (lane >> 4)) ^ (lane & 7));
    w_in[q] = 16 * ((2 * q + (lane >> 3 & 1)) ^ (lane & 7));
  }
  float acc[M][2 * N][4];
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int j = 0; j < 2 * N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;

  for (int s = 0; s < STAGES - 1; s++) {
    if (s < n_stages) copy(s);
    cp_async_commit();
  }
  Share share;
  if (!COPIED) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i % 4 == 0) fetch(share, w, planes, first_row, row0, n_rows, k, 0, i / 4);
      put(s_w, share, i);
    }
  }
  for (int s = 0; s < n_stages; s++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // stage s is there, and stage s - 1 has been read
    if (s + STAGES - 1 < n_stages) copy(s + STAGES - 1);
    cp_async_commit();
    const saddr x_s = x_at + s % STAGES * (X_CHUNKS * 16), w_s = w_at + s % W_STAGES * (W_CHUNKS * 16);
    uint4* next = s_w + (s + 1) % W_STAGES * W_CHUNKS;
#pragma unroll
    for (int q = 0; q < K; q++) {
      if (!COPIED && q % (K / 2) == 0)  // beyond the end: the last, for no one
        fetch(share, w, planes, first_row, row0, n_rows, k, s + 1, q / (K / 2));
      u32 a[M][4];
#pragma unroll
      for (int i = 0; i < M; i++) ldsm_x4(a[i], x_s + x_in[q % 4] + (q / 4 * TOKENS + 16 * i) * 128);
#pragma unroll
      for (int j = 0; j < N; j++) {
        u32 b[4];
        ldsm_x4(b, w_s + w_in[q % 4] + (q / 4 * ROWS + 16 * j) * 128);
#pragma unroll
        for (int i = 0; i < M; i++) {
          mma16816<T>(acc[i][2 * j], a[i], b[0], b[1]);
          mma16816<T>(acc[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
      if (COPIED) continue;
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (q == (IS_FLOAT ? (K / 2) * (i / 4) + K / 2 - 1 : K / 2 + i * K / 16)) put(next, share, i);
    }
  }
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int j = 0; j < 2 * N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int p = first + wt + 16 * i + (lane >> 2) + 8 * (e >> 1), row = row0 + wr + 8 * j + 2 * (lane & 3) + (e & 1);
        if (p < last && row < n_rows) {
          float* to = out + p * out_tok + row;
          *to = accumulate ? *to + acc[i][j][e] : acc[i][j][e];
        }
      }
}
