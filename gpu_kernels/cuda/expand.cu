// K and V of every head, expanded from rows of the K-cache, in 16 bits: what mha.cu attends over.
//
//   expand          grid (ceil(columns / 128), ceil(rows / 128)), 128 threads, 96 KB of dynamic shared memory
//   widen_rows      grid (ceil(rows / 128) * C / 8), 128 threads           q8 only
//   rotate_weights  grid (ceil(columns * H's blocks / 4)), 128 threads     q8 only
//
//   w        (columns, C)   first n_head * NOPE of K: W_UK, transposed; then n_head * N_V of V: W_UV
//   keys     (n_head, chunk, NOPE)      values  (n_head, chunk, N_V)       rows beyond n, up to a whole 128, are zeros
//
// A q8 row is scale * H c, so that a column w of the weights becomes H (weight * w), once a call, and rows stay the whole
// numbers that they are, which bf16 holds exactly; products are scaled at the end.
//
// A block makes 128 rows x 128 columns, 64 values of C a stage, three stages of cp.async; a warp 64 x 64. In shared memory,
// 16-byte chunk c of row r is at c ^ (r & 7).
//
// Defines: KV_LORA_RANK N_ROT TYPE_K (0 f16, 1 bf16, 2 q8) NOPE N_V
#include "prims.cuh"

constexpr int C = KV_LORA_RANK, SCALE_AT = C + 2 * N_ROT;
constexpr bool IS_Q8 = TYPE_K == 2;
#if TYPE_K == 0
typedef F16 T;
#else
typedef BF16 T;
#endif
constexpr int THREADS = 128, TILE = 128, DEPTH = 64, STAGES = 3, STAGE = 2 * TILE * DEPTH / 8;  // in chunks

DEVICE int chunk_at(int row, int c) { return row * (DEPTH / 8) + (c ^ (row & 7)); }

KERNEL(THREADS, 2, expand)(
    const u8* __restrict__ latents, i64 latent_stride, const u8* __restrict__ rows, i64 row_stride, int n,
    const u16* __restrict__ w, int n_head, u16* __restrict__ keys, u16* __restrict__ values, int chunk) {
  DYN_SMEM(smem);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int n_columns = n_head * (NOPE + N_V), col0 = blockIdx.x * TILE, row0 = blockIdx.y * TILE;
  const int wm = warp % 2 * 64, wn = warp / 2 * 64;
  auto load = [&](int stage) {
    if (stage < C / DEPTH) {
      uint4* to = smem + stage % STAGES * STAGE;
#pragma unroll
      for (int i = 0; i < TILE * DEPTH / 8 / THREADS; i++) {
        const int e = tid + i * THREADS, r = e / (DEPTH / 8), c = e % (DEPTH / 8), col = stage * DEPTH + 8 * c;
        const bool is_row = row0 + r < n, is_column = col0 + r < n_columns;
        cp_async16(smem_addr(to + chunk_at(r, c)), latents + (is_row ? row0 + r : 0) * latent_stride + 2 * col, is_row);
        cp_async16(smem_addr(to + chunk_at(TILE + r, c)), w + (i64)(is_column ? col0 + r : 0) * C + col, is_column);
      }
    }
    cp_async_commit();
  };
  saddr a_at[4], b_at[4];  // by 16 values of a stage
#pragma unroll
  for (int q = 0; q < 4; q++) {
    a_at[q] = smem_addr(smem + chunk_at(wm + (lane & 15), 2 * q + (lane >> 4)));
    b_at[q] = smem_addr(smem + chunk_at(TILE + wn + (lane & 7) + 8 * (lane >> 4), 2 * q + (lane >> 3 & 1)));
  }
  float acc[4][8][4];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;

  for (int s = 0; s < STAGES - 1; s++) load(s);
  for (int s = 0; s < C / DEPTH; s++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // stage s is there, and stage s - 1 is used up
    load(s + STAGES - 1);
    const int at = s % STAGES * (STAGE * 16);
#pragma unroll
    for (int q = 0; q < DEPTH / 16; q++) {
      u32 a[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) ldsm_x4(a[i], a_at[q] + at + i * (16 * DEPTH * 2));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 b[4];
        ldsm_x4(b, b_at[q] + at + j * (16 * DEPTH * 2));
#pragma unroll
        for (int i = 0; i < 4; i++) {
          mma16816<T>(acc[i][2 * j], a[i], b[0], b[1]);
          mma16816<T>(acc[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  // through shared memory, 16 chunks a row, so that 16 bytes are written at once
  auto out_at = [](int row, int c) { return row * (TILE / 8) + (c ^ (row & 7)); };
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = wm + 16 * i + 8 * h + (lane >> 2);
      float scale = 1.f;
      if (IS_Q8) scale = row0 + r < n ? *(const float*)(rows + (row0 + r) * row_stride + SCALE_AT) : 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++)
        ((u32*)(smem + out_at(r, wn / 8 + j)))[lane & 3] = pack2<T>(acc[i][j][2 * h] * scale, acc[i][j][2 * h + 1] * scale);
    }
  __syncthreads();
#pragma unroll 4
  for (int e = tid; e < TILE * TILE / 8; e += THREADS) {
    const int r = e / (TILE / 8), c = e % (TILE / 8), col = col0 + 8 * c, of_v = col - n_head * NOPE;
    if (col >= n_columns) continue;
    u16* to = of_v < 0 ? keys + ((i64)(col / NOPE) * chunk + row0 + r) * NOPE + col % NOPE
                       : values + ((i64)(of_v / N_V) * chunk + row0 + r) * N_V + of_v % N_V;
    *(uint4*)to = smem[out_at(r, c)];
  }
}

// out (rows, C): the whole numbers of q8 rows; zeros beyond n
KERNEL(THREADS, 1, widen_rows)(const u8* __restrict__ rows, i64 row_stride, int n, u16* __restrict__ out) {
  const int e = blockIdx.x * THREADS + threadIdx.x, row = e / (C / 8);
  uint4 v = make_uint4(0, 0, 0, 0);
  if (row < n) {
    const uint2 eight = *(const uint2*)(rows + row * row_stride + e % (C / 8) * 8);
    auto two = [](u32 x) { return pack2<T>((float)(int)(x & 255) - 128.f, (float)(int)(x >> 8 & 255) - 128.f); };
    v = make_uint4(two(eight.x), two(eight.x >> 16), two(eight.y), two(eight.y >> 16));
  }
  ((uint4*)out)[e] = v;
}

// out (columns, C) = H (weight * w), w (columns, C) f32. A warp takes one of H's blocks: a lane neighbouring values, so that
// butterflies are within a lane, then between lanes.
KERNEL(THREADS, 1, rotate_weights)(
    const float* __restrict__ w, const float* __restrict__ weight, u16* __restrict__ out, int n_columns) {
  constexpr int BLOCK = C & -C, MINE = BLOCK / 32;
  static_assert(MINE % 4 == 0, "float4");
  const int lane = threadIdx.x & 31, block = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
  if (block >= n_columns * (C / BLOCK)) return;
  const i64 at = (i64)block * BLOCK + lane * MINE;
  const float4 *from = (const float4*)(w + at), *gamma = (const float4*)(weight + at % C);
  float v[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i += 4) {
    const float4 x = from[i / 4], g = gamma[i / 4];
    v[i] = x.x * g.x;
    v[i + 1] = x.y * g.y;
    v[i + 2] = x.z * g.z;
    v[i + 3] = x.w * g.w;
  }
#pragma unroll
  for (int h = 1; h < MINE; h *= 2)
#pragma unroll
    for (int i = 0; i < MINE; i++)
      if ((i & h) == 0) {
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
#pragma unroll
  for (int h = 1; h < 32; h *= 2)
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const float other = __shfl_xor_sync(0xffffffffu, v[i], h);
      v[i] = lane & h ? other - v[i] : v[i] + other;
    }
  const float factor = 1.f / sqrtf((float)BLOCK);
#pragma unroll
  for (int i = 0; i < MINE; i += 2) ((u32*)(out + at))[i / 2] = pack2<T>(v[i] * factor, v[i + 1] * factor);
}
