// mla_decode: attention of 1-16 query tokens over K-cache rows in MQA mode; V is the latent part of K.
//
// mla_split    grid (splits, lanes / (16 M_TILES)), 256 threads, SHARED_BYTES of dynamic shared memory
// mla_combine  as mla.cuh says
//
// A lane is a pair (token, head). A block holds 16 M_TILES lanes and a range of tiles of TOKENS rows, each tile once in
// shared memory for scores and values. Splits are equal shares of the longest n_kv, which is read from device memory:
// a captured graph follows it.
//
// Defines: KV_LORA_RANK N_ROT TYPE_K (0 f16, 1 bf16, 2 q8) M_TILES TOKENS (32, 64) STAGES Q_IN_REGISTERS
// SHARED_BYTES
//
//   tile    TOKENS x C + R values of 16 bits in 16-byte chunks, chunk c of token t at c ^ (t & 7): copies, ldmatrix
//           (scores) and ldmatrix.trans (values) meet no bank conflicts
//   f16, bf16   STAGES tiles; rows are copied as they are (cp.async), while earlier ones are computed
//   q8          STAGES of raw rows, and one tile of f16 that they are widened to: value = (byte - 128) * scale
//   scores  over the warps (16 lanes x tokens; with M_TILES 1 also halves of the row); softmax by 16 / M_TILES threads a lane
//   out     16 M_TILES x C f32 in registers, 8 warps x C / 8 columns, rescaled only if a maximum moved
#include "prims.cuh"
#include "mla.cuh"

constexpr int CHUNKS = (C + R) / 8, PITCH = (CHUNKS + 7) / 8 * 8;  // 16-byte chunks of a row; the rest is zeros
constexpr int THREADS = 256, LANES = 16 * M_TILES;
constexpr int TILE = TOKENS * PITCH * 16;
constexpr int HALVES = M_TILES == 1 ? 2 : 1;  // of a row, whose scores are added up in the softmax
constexpr int SCORES = TOKENS + 8;            // floats a lane: float2 accesses meet no conflicts
constexpr int RAW_ROW = (C + 2 * R + 4 + 15) / 16 * 16, RAW_TILE = TOKENS * RAW_ROW;

constexpr int AT_RAW = IS_Q8 ? TILE : STAGES * TILE;
constexpr int AT_Q = AT_RAW + (IS_Q8 ? STAGES * RAW_TILE : 0);
constexpr bool Q_IN_TILE = IS_Q8 && Q_IN_REGISTERS;  // until the first rows are widened
constexpr int AT_S = AT_Q + (Q_IN_TILE ? 0 : LANES * PITCH * 16);
constexpr int AT_P = AT_S + HALVES * LANES * SCORES * 4;
constexpr int AT_FADE = AT_P + LANES * TOKENS * 2;
static_assert(AT_FADE + LANES * 4 == SHARED_BYTES, "attention.py counts differently");
static_assert(!Q_IN_TILE || LANES <= TOKENS, "queries do not fit into a tile");
static_assert(C % 128 == 0 && R % 8 == 0 && STAGES >= 2, "shape");

DEVICE int chunk_at(int row, int c) { return row * PITCH + (c ^ (row & 7)); }
DEVICE int p_chunk_at(int row, int c) {  // 128 bytes hold two lanes of 32 tokens, or one of 64
  return row * (TOKENS / 8) + (c ^ (TOKENS == 32 ? (row >> 1) & 3 : row & 7));
}

KERNEL(THREADS, 1, mla_split)(
    const float* __restrict__ q, i64 q_tok, i64 q_head, const u8* __restrict__ rows, i64 row_stride,
    const int* __restrict__ n_kv, int n_tok, int n_head, float scale_log2, float* __restrict__ part_out,
    float2* __restrict__ part_ml) {
  DYN_SMEM(smem_raw);
  char* sm = (char*)smem_raw;
  uint4* s_k = (uint4*)sm;
  uint4* s_q = (uint4*)(sm + (Q_IN_TILE ? 0 : AT_Q));
  float* s_s = (float*)(sm + AT_S);
  u32* s_p = (u32*)(sm + AT_P);
  float* s_fade = (float*)(sm + AT_FADE);
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  const int n_lanes = n_tok * n_head, lane0 = blockIdx.y * LANES, split = blockIdx.x;
  const int per = tiles_per_split(n_kv, n_tok, gridDim.x);
  // softmax: SHARE threads a lane, of which this one takes pairs of tokens
  constexpr int SHARE = THREADS / LANES, MINE = TOKENS / SHARE;
  const int sl = tid / SHARE, sc = (tid % SHARE) * 2, my_lane = lane0 + sl;
  const int lim = my_lane < n_lanes ? n_kv[my_lane / n_head] : 0;

  const int last = longest(n_kv, lane0 / n_head, min(n_tok, (lane0 + LANES - 1) / n_head + 1));
  const int t_beg = split * per;
  int t_end = (last + TOKENS - 1) / TOKENS;
  if (t_end > t_beg + per) t_end = t_beg + per;
  if (t_beg >= t_end) return;

  // 8 threads copy 128 contiguous bytes of one token; the swizzle touches only the low 3 bits of a chunk's number
  constexpr int AT_ONCE = THREADS / 8;  // tokens
  const int lr = tid >> 3, lc = tid & 7;
  auto load = [&](int t) {
    if (t < t_end) {
#pragma unroll
      for (int r = lr; r < TOKENS; r += AT_ONCE) {
        const int tok = t * TOKENS + r;
        const bool ok = tok < last;
        const u8* src = rows + (ok ? tok : 0) * row_stride;
        if (IS_Q8) {
          const saddr dst = smem_addr(sm + AT_RAW + (t % STAGES) * RAW_TILE + r * RAW_ROW);
#pragma unroll
          for (int c = 0; c < RAW_ROW / 16; c += 8)
            if (c + lc < RAW_ROW / 16) cp_async16(dst + (c + lc) * 16, src + (c + lc) * 16, ok);
        } else {
          const saddr dst = smem_addr(s_k + chunk_at(r, lc)) + (t % STAGES) * TILE;
#pragma unroll
          for (int c = 0; c < PITCH; c += 8) {
            const bool in_row = PITCH == CHUNKS || c + lc < CHUNKS;
            cp_async16(dst + c * 16, src + (in_row ? (c + lc) * 16 : 0), ok && in_row);
          }
        }
      }
    }
    cp_async_commit();
  };
  // raw rows of tile t -> f16
  auto widen = [&](int t) {
#pragma unroll
    for (int r = lr; r < TOKENS; r += AT_ONCE) {
      const u8* raw = (const u8*)(sm + AT_RAW + (t % STAGES) * RAW_TILE + r * RAW_ROW);
      const float scale = *(const float*)(raw + C + 2 * R);
      const u32 scale2 = pack2<F16>(scale, scale);
      uint4* dst = s_k + chunk_at(r, lc);
#pragma unroll
      for (int c = 0; c < PITCH; c += 8) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (c + 8 <= C / 8) {
          const uint2 b = *(const uint2*)(raw + (c + lc) * 8);
          v = widened_latent(b.x, b.y, scale2);
        } else if (c + lc < CHUNKS) {
          v = widened_rope(*(const uint4*)(raw + C + (c + lc - C / 8) * 16));
        }
        dst[c] = v;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load(t_beg + i);

  for (int e = tid; e < LANES * PITCH; e += THREADS) {
    const int r = e / PITCH, c = e % PITCH, l = lane0 + r;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (l < n_lanes && c < CHUNKS) {
      const float4* s = (const float4*)(q + l / n_head * q_tok + l % n_head * q_head + c * 8);
      const float4 x = s[0], y = s[1];
      v = make_uint4(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w), pack2<T>(y.x, y.y), pack2<T>(y.z, y.w));
    }
    s_q[chunk_at(r, c)] = v;
  }
  // scores: warp -> (16 lanes, group of tokens, half of each 64 values)
  constexpr int GROUPS = 8 / (M_TILES * HALVES), EIGHTS = TOKENS / 8 / GROUPS, STEPS = PITCH / 8, PIECES = 2 / HALVES;
  static_assert(GROUPS * EIGHTS * 8 == TOKENS, "partition");
  const int wm = w % M_TILES, wn = (w / M_TILES) % GROUPS, wh = w / (M_TILES * GROUPS);
  saddr q_at[PIECES][2], k_at[PIECES];
#pragma unroll
  for (int u = 0; u < PIECES; u++) {
    const int c = (HALVES == 2 ? wh : u) * 4;
    q_at[u][0] = smem_addr(s_q + chunk_at(wm * 16 + (lane & 15), c + (lane >> 4)));
    q_at[u][1] = smem_addr(s_q + chunk_at(wm * 16 + (lane & 15), c + 2 + (lane >> 4)));
    k_at[u] = smem_addr(s_k + chunk_at(wn * EIGHTS * 8 + (lane & 7), c + (lane >> 3)));
  }
  u32 q_reg[Q_IN_REGISTERS ? STEPS * PIECES * 2 : 1][4];
  if (Q_IN_REGISTERS) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STEPS * PIECES * 2; i++)
      ldsm_x4(q_reg[Q_IN_REGISTERS ? i : 0], q_at[i / 2 % PIECES][i & 1] + i / (2 * PIECES) * 128);
  }
  constexpr int WIDTH = C / 8, OUT = WIDTH / 8;  // columns of a warp, in eights
  saddr v_at[OUT / 2], p_at[TOKENS / 16];
#pragma unroll
  for (int j = 0; j < OUT / 2; j++) v_at[j] = smem_addr(s_k + chunk_at(lane & 15, w * OUT + j * 2 + (lane >> 4)));
#pragma unroll
  for (int k = 0; k < TOKENS / 16; k++)
    p_at[k] = smem_addr((const uint4*)s_p + p_chunk_at(lane & 15, k * 2 + (lane >> 4)));
  float m_run = NEG_INF, l_run = 0.f;
  float o[M_TILES][OUT][4];
#pragma unroll
  for (int i = 0; i < M_TILES; i++)
#pragma unroll
    for (int j = 0; j < OUT; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) o[i][j][k] = 0.f;

  for (int t = t_beg; t < t_end; t++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // tile t has landed, tile t - 1 is used up
    load(t + STAGES - 1);
    if (IS_Q8) {
      widen(t);
      __syncthreads();
    }
    const int K = IS_Q8 ? 0 : t % STAGES * TILE;
    float acc[EIGHTS][2][4];
#pragma unroll
    for (int j = 0; j < EIGHTS; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) acc[j][0][k] = acc[j][1][k] = 0.f;
#pragma unroll(M_TILES == 4 ? 3 : STEPS)
    for (int g = 0; g < STEPS; g++)
#pragma unroll
      for (int u = 0; u < PIECES; u++) {
        u32 a0[4], a1[4];
        if (!Q_IN_REGISTERS) {
          ldsm_x4(a0, q_at[u][0] + g * 128);
          ldsm_x4(a1, q_at[u][1] + g * 128);
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
          u32 b[4];
          ldsm_x4(b, k_at[u] + K + g * 128 + j * (8 * PITCH * 16));
          if (Q_IN_REGISTERS) {
            mma16816<T>(acc[j][0], q_reg[Q_IN_REGISTERS ? (g * PIECES + u) * 2 : 0], b[0], b[1]);
            mma16816<T>(acc[j][1], q_reg[Q_IN_REGISTERS ? (g * PIECES + u) * 2 + 1 : 0], b[2], b[3]);
          } else {
            mma16816<T>(acc[j][0], a0, b[0], b[1]);
            mma16816<T>(acc[j][1], a1, b[2], b[3]);
          }
        }
      }
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
      float* d = s_s + (wh * LANES + wm * 16 + (lane >> 2)) * SCORES + (wn * EIGHTS + j) * 8 + (lane & 3) * 2;
      *(float2*)d = make_float2(acc[j][0][0] + acc[j][1][0], acc[j][0][1] + acc[j][1][1]);
      *(float2*)(d + 8 * SCORES) = make_float2(acc[j][0][2] + acc[j][1][2], acc[j][0][3] + acc[j][1][3]);
    }
    __syncthreads();
    float x[MINE], top = NEG_INF;
#pragma unroll
    for (int i = 0; i < MINE; i += 2) {
      const int col = i * SHARE + sc, tok = t * TOKENS + col;
      float2 v = *(const float2*)(s_s + sl * SCORES + col);
      if (HALVES == 2) {
        const float2 u = *(const float2*)(s_s + (LANES + sl) * SCORES + col);
        v.x += u.x;
        v.y += u.y;
      }
      x[i] = tok < lim ? v.x * scale_log2 : NEG_INF;
      x[i + 1] = tok + 1 < lim ? v.y * scale_log2 : NEG_INF;
      top = fmaxf(top, fmaxf(x[i], x[i + 1]));
    }
#pragma unroll
    for (int d = SHARE / 2; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
    const float m_new = fmaxf(m_run, top), m_use = m_new == NEG_INF ? 0.f : m_new;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      x[i] = ex2(x[i] - m_use);
      sum += x[i];
    }
#pragma unroll
    for (int d = SHARE / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const float fade = m_run == NEG_INF ? 0.f : ex2(m_run - m_use);
    l_run = l_run * fade + sum;
    m_run = m_new;
#pragma unroll
    for (int i = 0; i < MINE; i += 2) {
      const int col = i * SHARE + sc;
      s_p[p_chunk_at(sl, col / 8) * 4 + (col % 8) / 2] = pack2<T>(x[i], x[i + 1]);
    }
    if (sc == 0) s_fade[sl] = fade;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < M_TILES; i++) {
      const float f0 = s_fade[i * 16 + (lane >> 2)], f1 = s_fade[i * 16 + 8 + (lane >> 2)];
      if (__any_sync(0xffffffffu, f0 != 1.f || f1 != 1.f)) {
#pragma unroll
        for (int j = 0; j < OUT; j++) {
          o[i][j][0] *= f0;
          o[i][j][1] *= f0;
          o[i][j][2] *= f1;
          o[i][j][3] *= f1;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++) {
      u32 p[M_TILES][4];
#pragma unroll
      for (int i = 0; i < M_TILES; i++) ldsm_x4(p[i], p_at[k] + i * (16 * TOKENS * 2));
#pragma unroll
      for (int j = 0; j < OUT; j += 2) {
        u32 b[4];
        ldsm_x4_t(b, v_at[j / 2] + K + k * (16 * PITCH * 16));
#pragma unroll
        for (int i = 0; i < M_TILES; i++) {
          mma16816<T>(o[i][j], p[i], b[0], b[1]);
          mma16816<T>(o[i][j + 1], p[i], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  if (sc == 0) {
    s_fade[sl] = l_run > 0.f ? 1.f / l_run : 0.f;
    if (my_lane < n_lanes) part_ml[(i64)split * n_lanes + my_lane] = make_float2(m_run, l_run);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < M_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = i * 16 + h * 8 + (lane >> 2);
      if (lane0 + r < n_lanes) {
        const float inv = s_fade[r];
        float* d = part_out + ((i64)split * n_lanes + lane0 + r) * C + w * WIDTH + (lane & 3) * 2;
#pragma unroll
        for (int j = 0; j < OUT; j++) *(float2*)(d + j * 8) = make_float2(o[i][j][h * 2] * inv, o[i][j][h * 2 + 1] * inv);
      }
    }
}
