// gemm: out[t, h, r] (+)= weight[h, r] . x[t, h] for many tokens, on tensor cores, with f32 sums.
//
//   grid (token tiles * ceil(rows / ROWS) * heads, splits), token tiles first so that a weight's readers run together;
//   32 * WARPS_T * WARPS_R threads; dynamic shared memory: STAGES tiles of x, two of weights (STAGES if they are floats),
//   TOKENS * 4 bytes
//
// A block makes TOKENS x ROWS, DEPTH values of k a stage. x is 16 bits wide (quantise.cu: narrow), its rows filled up with
// zeros to a multiple of 128 and x_tok and x_head bytes apart; it comes by cp.async, STAGES - 1 stages ahead. So do
// weights that are floats. Quantised ones of the next stage are loaded to registers before this stage is multiplied, and
// written as 16-bit values between its last products: a thread's share is a unit, 64 values of a row. One barrier a stage.
//
// A tile is of units: 64 values of each row, 128 bytes, 16-byte chunk c of row r at c ^ (r & 7). The values of a unit
// are those of one step of blocks.cuh, or of two; where a step is not contiguous, x is fetched in its order.
// Tokens beyond the last are zeros. Beyond the last row or k, a valid place is read again: it meets zeros or is not stored.
//
// With tiles (int4: matrix, first and last position, 0), a token tile takes its matrix and its positions from there; an
// empty one ends at once. The x of position p is then row gather[p] / per (null: p), and out's row is p.
//
// Each split adds up its share of k, into an out of its own, out_split values on.
//
// Defines: TYPE_ID (see blocks.cuh; 1 F16, 30 BF16) F16_PRODUCTS (0: bf16) TOKENS ROWS WARPS_T WARPS_R DEPTH STAGES
#include "prims.cuh"
#include "blocks.cuh"

#if F16_PRODUCTS
typedef F16 T;
#else
typedef BF16 T;
#endif
constexpr bool IS_FLOAT = TYPE_ID == 1 || TYPE_ID == 30;
constexpr int THREADS = 32 * WARPS_T * WARPS_R, UNITS = DEPTH / 64;
constexpr int W_STAGES = IS_FLOAT ? STAGES : 2, X_CHUNKS = TOKENS * DEPTH / 8, W_CHUNKS = ROWS * DEPTH / 8;
constexpr int X_PIECES = X_CHUNKS / THREADS, PIECES = X_PIECES + (IS_FLOAT ? W_CHUNKS / THREADS : 0);
constexpr int M = TOKENS / WARPS_T / 16, N = ROWS / WARPS_R / 16, K = DEPTH / 16;  // a warp's products: 16 each way
// a thread's share of weights in two halves, one after the other, where there are not registers for all of it
constexpr bool HALVES = GROUPS == 1 && M * N == 16;
constexpr bool CAN_SPLIT = M * N < 16;  // a large block has no register to spare, and fills a card without
static_assert(ROWS * UNITS == THREADS, "a thread has one unit");
static_assert(TOKENS % (THREADS / 8) == 0 && THREADS % 64 == 0, "chunk_at(r + THREADS / 8, c) is THREADS chunks on");

// where group g (of 32 values) of a unit begins in its row
DEVICE int column(int unit, int g) {
  if (IS_FLOAT) return 64 * unit + 32 * g;
  const u32 step = unit * (2 / GROUPS) + g / GROUPS;
  return step / STEPS * BLOCK + 32 * group_at(step % STEPS, g % GROUPS);
}
// after which of a stage's K * N turns chunk i of a unit is written: late after its fetch, whose data take their time
DEVICE constexpr int put_at(int i) {
  return HALVES ? K * N / 2 * (i / 4 + 1) - 3 + i % 4 * 3 / 4 : K * N / 2 + i * (K * N / 2) / 8;
}
DEVICE int chunk_at(int row, int c) { return row * 8 + (c ^ (row & 7)); }

// two values of weights that are floats, as they are multiplied
DEVICE u32 as_product(u32 two) {
  if (!IS_FLOAT || TYPE_ID == (F16_PRODUCTS ? 1 : 30)) return two;
  return TYPE_ID == 1 ? pack2<T>(f16_to_f32((u16)two), f16_to_f32((u16)(two >> 16)))
                      : pack2<T>(bf16_to_f32((u16)two), bf16_to_f32((u16)(two >> 16)));
}

// A thread's share of a stage of quantised weights.
constexpr int HELD = HALVES ? 1 : 2 / GROUPS;
struct Share { Codes c[HELD]; };  // of unit tid / ROWS of row tid % ROWS: neighbours write to different banks

DEVICE void fetch(Share& s, const Planes& planes, i64 first, int row0, int n_rows, int k, int stage, int half) {
  if (half && !HALVES) return;
  const int row = min(row0 + (int)threadIdx.x % ROWS, n_rows - 1), unit = stage * UNITS + threadIdx.x / ROWS;
  const int n_blocks = k / BLOCK;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const u32 step = unit * (2 / GROUPS) + i + half;
    decode_step(s.c[i], planes, (first + row) * n_blocks + min((int)(step / STEPS), n_blocks - 1), step % STEPS);
  }
}
DEVICE void put(uint4* s_w, const Share& s, int i) {  // chunk i of the unit
  const int of_step = i / 4 % GROUPS;
  const Codes& c = s.c[HALVES ? 0 : i / 4 / GROUPS];
  const float scale = c.s[of_step][i % 4 / 2], minimum = c.m[of_step][i % 4 / 2];
  u32 p[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 four = (u32)c.v[of_step][i % 4 * 2 + j / 2] ^ 0x80808080u;
    const int at = j % 2 * 2;
    p[j] = pack2<T>(scale * byte_to_f32(four, at) - minimum, scale * byte_to_f32(four, at + 1) - minimum);
  }
  s_w[chunk_at(threadIdx.x, i)] = make_uint4(p[0], p[1], p[2], p[3]);
}

KERNEL(THREADS, 256 / THREADS, gemm)(
    const u8* __restrict__ w, i64 at_b, i64 at_c, i64 at_d, const u8* __restrict__ x, int x_tok, i64 x_head,
    float* __restrict__ out, i64 out_tok, i64 out_head, i64 out_split, int n_rows, int k, int n_tok, int n_tiles, int accumulate,
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
  if (CAN_SPLIT) out += blockIdx.y * out_split;
  const Planes planes = {w, w + at_b, w + at_c, w + at_d};
  const i64 first_row = (i64)matrix * n_rows;
  const u8* w_first = w + first_row * k * 2;  // if they are floats
  const int n_stages = (k + DEPTH - 1) / DEPTH, each = (n_stages + (int)gridDim.y - 1) / (int)gridDim.y;
  const int begin = CAN_SPLIT ? blockIdx.y * each : 0, end = CAN_SPLIT ? min(begin + each, n_stages) : n_stages;
  const saddr x_to = smem_addr(s_x + chunk_at(tid / 8, tid % 8)), w_to = smem_addr(s_w + chunk_at(tid / 8, tid % 8));

  // piece i of a stage's copies: a chunk of x a thread, then of weights; none beyond the last stage
  const int c = tid % 8, r = tid / 8;
  auto copy = [&](int stage, int i) {
    const int slot = stage % STAGES, of_x = i * (THREADS / 8) % TOKENS, of_w = (i - X_PIECES) * (THREADS / 8) % ROWS;
    if (i < X_PIECES) {
      const int from = s_from[r + of_x], col = column(stage * UNITS + i * (THREADS / 8) / TOKENS, c / 4) + c % 4 * 8;
      const u8* at = x + 2 * col + (u64)(u32)max(from, 0) * (u32)x_tok;
      cp_async16(x_to + (slot * X_CHUNKS + i * THREADS) * 16, at, from >= 0 && stage < end);
    } else {
      const int row = min(row0 + r + of_w, n_rows - 1), unit = stage * UNITS + (i - X_PIECES) * (THREADS / 8) / ROWS;
      const u8* at = w_first + 2 * min(64 * unit + 8 * c, k - 8) + (u64)(u32)row * (u32)(2 * k);
      cp_async16(w_to + (slot * W_CHUNKS + (i - X_PIECES) * THREADS) * 16, at, stage < end);
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
#pragma unroll
    for (int i = 0; i < PIECES; i++) copy(begin + s, i);
    cp_async_commit();
  }
  Share share;
  if (!IS_FLOAT) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i % 4 == 0) fetch(share, planes, first_row, row0, n_rows, k, begin, i / 4);
      put(s_w + begin % W_STAGES * W_CHUNKS, share, i);
    }
  }
  for (int s = begin; s < end; s++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // stage s is there, and stage s - 1 has been read
    const saddr x_s = x_at + s % STAGES * (X_CHUNKS * 16), w_s = w_at + s % W_STAGES * (W_CHUNKS * 16);
    uint4* next = s_w + (s + 1) % W_STAGES * W_CHUNKS;
#pragma unroll
    for (int q = 0; q < K; q++) {
      if (!IS_FLOAT && q % (K / 2) == 0)  // beyond the end: the last, for no one
        fetch(share, planes, first_row, row0, n_rows, k, s + 1, q / (K / 2));
      u32 a[M][4];
#pragma unroll
      for (int i = 0; i < M; i++) ldsm_x4(a[i], x_s + x_in[q % 4] + (q / 4 * TOKENS + 16 * i) * 128);
#pragma unroll
      for (int j = 0; j < N; j++) {
        u32 b[4];
        ldsm_x4(b, w_s + w_in[q % 4] + (q / 4 * ROWS + 16 * j) * 128);
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = as_product(b[i]);
#pragma unroll
        for (int i = 0; i < M; i++) {
          mma16816<T>(acc[i][2 * j], a[i], b[0], b[1]);
          mma16816<T>(acc[i][2 * j + 1], a[i], b[2], b[3]);
        }
        const int turn = q * N + j;  // of K * N, between which all else of the stage is spread
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          if (i * (K * N / 2) / PIECES == turn) copy(s + STAGES - 1, i);
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (!IS_FLOAT && put_at(i) == turn) put(next, share, i);
      }
    }
    cp_async_commit();
  }
  cp_async_wait<0>();
  auto store = [&](bool add) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int p = first + wt + 16 * i + (lane >> 2) + 8 * h, left = p < last ? n_rows - row0 - wr - 2 * (lane & 3) : 0;
        float* to = out + p * out_tok + row0 + wr + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < 2 * N; j++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (8 * j + e < left) to[8 * j + e] = acc[i][j][2 * h + e] + (add ? to[8 * j + e] : 0.f);
      }
  };
  if (accumulate) store(true);
  else store(false);
}
