// Causal attention of many query tokens over a chunk of expanded K and V (expand.cu): MHA mode.
//
//   mha          grid (n_head * ceil(tokens / ROWS), splits), 32 WARPS threads, SHARED_BYTES of dynamic shared memory
//   mha_combine  grid (ceil(tokens * n_head * N_V / 512)), 128 threads; a thread takes four values
//
//   k[t, h] = [ keys[h, t] | rope of row t ]        NOPE + N_ROT values; the rope is read from the cache's rows
//
// A block holds ROWS = 16 M_TILES WARPS queries of one head, a warp 16 M_TILES of them with its part of scores, softmax and
// outputs in registers. It takes one of `splits` shares of the tiles of TOKENS rows that its queries see. Sums over its
// share of all chunks are kept between launches: part_out (splits, tokens, n_head, N_V) f32, not normalised, and part_ml
// (splits, tokens, n_head) of maximum and sum, in powers of two. mha_combine adds the splits up.
//
// K and V of one tile are held: V lands while scores are computed, the next K while P meets V. Queries with most to
// see come first. In shared memory, 16-byte chunk c of row r is at c ^ (r & 7).
//
// Defines: KV_LORA_RANK N_ROT TYPE_K (0 f16, 1 bf16, 2 q8) NOPE N_V M_TILES WARPS TOKENS BLOCKS (a multiprocessor)
// SHARED_BYTES
#include "prims.cuh"

constexpr int D = NOPE + N_ROT, ROPE_AT = TYPE_K == 2 ? KV_LORA_RANK : 2 * KV_LORA_RANK;
constexpr int THREADS = 32 * WARPS, OF_WARP = 16 * M_TILES, ROWS = OF_WARP * WARPS;
constexpr int K_PITCH = (D + 63) / 64 * 8, V_PITCH = (N_V + 63) / 64 * 8;  // in chunks
static_assert((ROWS * K_PITCH + TOKENS * (K_PITCH + V_PITCH)) * 16 == SHARED_BYTES, "mha.py counts differently");
static_assert(D % 16 == 0 && NOPE % 8 == 0 && N_V % 16 == 0 && TOKENS % 16 == 0, "shape");
#if TYPE_K == 0
typedef F16 T;
#else
typedef BF16 T;
#endif

KERNEL(THREADS, BLOCKS, mha)(
    const float* __restrict__ q, i64 q_tok, i64 q_head, const u16* __restrict__ keys, const u16* __restrict__ values,
    const u8* __restrict__ rows, i64 row_stride, int chunk, int first, int n, int n_past, int n_tok, int n_head,
    float scale_log2, float* __restrict__ part_out, float2* __restrict__ part_ml) {
  DYN_SMEM(smem);
  uint4 *s_q = smem, *s_k = s_q + ROWS * K_PITCH, *s_v = s_k + TOKENS * K_PITCH;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int head = blockIdx.x % n_head, q0 = ((int)(gridDim.x / n_head) - 1 - (int)(blockIdx.x / n_head)) * ROWS;
  const int last = (q0 + ROWS < n_tok ? q0 + ROWS : n_tok) - 1, seen = n_past + last + 1 - first;
  const int tiles = ((seen < n ? seen : n) + TOKENS - 1) / TOKENS, per = (tiles + gridDim.y - 1) / (int)gridDim.y;
  const int t_beg = blockIdx.y * per, t_end = t_beg + per < tiles ? t_beg + per : tiles;
  if (first > 0 && t_beg >= t_end) return;
  keys += (i64)head * chunk * NOPE;
  values += (i64)head * chunk * N_V;

  // 8 threads copy 128 contiguous bytes of a row; chunk c + 8 of it is 128 bytes on
  const int lr = tid >> 3, lc = tid & 7;
  constexpr int AT_ONCE = THREADS / 8;
  static_assert(TOKENS % AT_ONCE == 0 && AT_ONCE % 8 == 0, "rows at once");
  auto at = [&](const uint4* tile, int pitch, int c) { return smem_addr(tile + lr * pitch + (c ^ (lr & 7))); };
  const saddr to_k = at(s_k, K_PITCH, lc), to_rope = at(s_k, K_PITCH, NOPE / 8 + lc), to_v = at(s_v, V_PITCH, lc);
  auto load_k = [&](int t) {
    const u16* from = keys + (i64)(t * TOKENS + lr) * NOPE + 8 * lc;
#pragma unroll
    for (int i = 0; i < TOKENS; i += AT_ONCE) {
#pragma unroll
      for (int c = 0; c < NOPE / 8; c += 8)
        if (c + 8 <= NOPE / 8 || c + lc < NOPE / 8) cp_async16(to_k + (i * K_PITCH + c) * 16, from + i * NOPE + c * 8, true);
      const int tok = t * TOKENS + lr + i;
      const bool ok = tok < n;
      const u8* rope = rows + (ok ? tok : 0) * row_stride + ROPE_AT + 16 * lc;
#pragma unroll
      for (int c = 0; c < N_ROT / 8; c += 8)
        if (c + 8 <= N_ROT / 8 || c + lc < N_ROT / 8) cp_async16(to_rope + (i * K_PITCH + c) * 16, rope + c * 16, ok);
    }
    cp_async_commit();
  };
  auto load_v = [&](int t) {
    const u16* from = values + (i64)(t * TOKENS + lr) * N_V + 8 * lc;
#pragma unroll
    for (int i = 0; i < TOKENS; i += AT_ONCE)
#pragma unroll
      for (int c = 0; c < N_V / 8; c += 8)
        if (c + 8 <= N_V / 8 || c + lc < N_V / 8) cp_async16(to_v + (i * V_PITCH + c) * 16, from + i * N_V + c * 8, true);
    cp_async_commit();
  };
  if (t_beg < t_end) load_k(t_beg);
  for (int e = tid; e < ROWS * (D / 8); e += THREADS) {
    const int r = e / (D / 8), c = e % (D / 8);
    uint4 v = make_uint4(0, 0, 0, 0);
    if (q0 + r < n_tok) {
      const float4* from = (const float4*)(q + (q0 + r) * q_tok + head * q_head + c * 8);
      const float4 x = from[0], y = from[1];
      const float f = scale_log2;
      v = make_uint4(pack2<T>(x.x * f, x.y * f), pack2<T>(x.z * f, x.w * f), pack2<T>(y.x * f, y.y * f), pack2<T>(y.z * f, y.w * f));
    }
    s_q[r * K_PITCH + (c ^ (r & 7))] = v;
  }
  // where a lane's chunk for ldmatrix is; the chunk 2k further on, for k < 4, is at ^ 32 k, since rows begin at multiples of 128
  auto lane_at = [&](const uint4* tile, int pitch, int row, int c) { return smem_addr(tile + row * pitch + (c ^ (row & 7))); };
  const saddr q_at = lane_at(s_q, K_PITCH, warp * OF_WARP + (lane & 15), lane >> 4);
  const saddr k_at = lane_at(s_k, K_PITCH, (lane & 7) + 8 * (lane >> 4), lane >> 3 & 1);
  const saddr v_at = lane_at(s_v, V_PITCH, lane & 15, lane >> 4);
  float o[M_TILES][N_V / 8][4], m[M_TILES][2], l[M_TILES][2];
  auto part_at = [&](int i, int h) {  // of row (i, h) of this lane; -1 beyond the last token
    const int t = q0 + warp * OF_WARP + 16 * i + 8 * h + (lane >> 2);
    return t < n_tok ? ((i64)blockIdx.y * n_tok + t) * n_head + head : -1;
  };
#pragma unroll
  for (int i = 0; i < M_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const i64 at = part_at(i, h);
      const bool is_there = first > 0 && at >= 0;
      const float2 ml = is_there ? part_ml[at] : make_float2(NEG_INF, 0.f);
      m[i][h] = ml.x;
      l[i][h] = (lane & 3) == 0 ? ml.y : 0.f;
#pragma unroll
      for (int j = 0; j < N_V / 8; j++) {
        const float2 v = is_there ? *(const float2*)(part_out + at * N_V + 8 * j + 2 * (lane & 3)) : make_float2(0.f, 0.f);
        o[i][j][2 * h] = v.x;
        o[i][j][2 * h + 1] = v.y;
      }
    }

  const int mine = n_past + q0 + warp * OF_WARP - first;  // the position of the warp's first query, counted in this chunk
  for (int t = t_beg; t < t_end; t++) {
    cp_async_wait<0>();
    __syncthreads();  // K has landed, and the V before is used up
    load_v(t);
    float s[M_TILES][TOKENS / 8][4];
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j][e] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      u32 a[M_TILES][4];
#pragma unroll
      for (int i = 0; i < M_TILES; i++) ldsm_x4(a[i], (q_at ^ k % 4 * 32) + k / 4 * 128 + i * (16 * K_PITCH * 16));
#pragma unroll
      for (int j = 0; j < TOKENS / 16; j++) {
        u32 b[4];
        ldsm_x4(b, (k_at ^ k % 4 * 32) + k / 4 * 128 + j * (16 * K_PITCH * 16));
#pragma unroll
        for (int i = 0; i < M_TILES; i++) {
          mma16816<T>(s[i][2 * j], a[i], b[0], b[1]);
          mma16816<T>(s[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // V has landed, and K is used up
    if (t * TOKENS + TOKENS - 1 > mine) {  // not all of it is seen by all
#pragma unroll
      for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int tok = t * TOKENS + 8 * j + 2 * (lane & 3) + (e & 1);
            if (tok > mine + 16 * i + 8 * (e >> 1) + (lane >> 2)) s[i][j][e] = NEG_INF;
          }
    }
    u32 p[M_TILES][TOKENS / 16][4];
#pragma unroll
    for (int i = 0; i < M_TILES; i++) {
      float fade[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = m[i][h];
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) top = fmaxf(top, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float use = top == NEG_INF ? 0.f : top;
        fade[h] = ex2(m[i][h] - use);
        m[i][h] = top;
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
          s[i][j][2 * h] = ex2(s[i][j][2 * h] - use);
          s[i][j][2 * h + 1] = ex2(s[i][j][2 * h + 1] - use);
          sum += s[i][j][2 * h] + s[i][j][2 * h + 1];
        }
        l[i][h] = l[i][h] * fade[h] + sum;
      }
#pragma unroll
      for (int k = 0; k < TOKENS / 16; k++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          p[i][k][e] = pack2<T>(s[i][2 * k + e / 2][2 * (e & 1)], s[i][2 * k + e / 2][2 * (e & 1) + 1]);
      if (__any_sync(0xffffffffu, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
        for (int j = 0; j < N_V / 8; j++) {
          o[i][j][0] *= fade[0];
          o[i][j][1] *= fade[0];
          o[i][j][2] *= fade[1];
          o[i][j][3] *= fade[1];
        }
      }
    }
    if (t + 1 < t_end) load_k(t + 1);
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++) {
#pragma unroll
      for (int j = 0; j < N_V / 16; j++) {
        u32 b[4];
        ldsm_x4_t(b, (v_at ^ j % 4 * 32) + j / 4 * 128 + k * (16 * V_PITCH * 16));
#pragma unroll
        for (int i = 0; i < M_TILES; i++) {
          mma16816<T>(o[i][2 * j], p[i][k], b[0], b[1]);
          mma16816<T>(o[i][2 * j + 1], p[i][k], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < M_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = l[i][h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const i64 at = part_at(i, h);
      if (at < 0) continue;
      if ((lane & 3) == 0) part_ml[at] = make_float2(m[i][h], sum);
#pragma unroll
      for (int j = 0; j < N_V / 8; j++)
        *(float2*)(part_out + at * N_V + 8 * j + 2 * (lane & 3)) = make_float2(o[i][j][2 * h], o[i][j][2 * h + 1]);
    }
}

// out = sum of the splits' outputs by 2^(m - greatest m), divided by that of their sums
KERNEL(128, 1, mha_combine)(
    const float4* __restrict__ part_out, const float2* __restrict__ part_ml, int n_splits, int n_tok, int n_head,
    float* __restrict__ out, i64 out_tok, i64 out_head) {
  const int e = blockIdx.x * 128 + threadIdx.x, lane = e / (N_V / 4), lanes = n_tok * n_head;  // token and head
  if (lane >= lanes) return;
  float top = NEG_INF, sum = 0.f;
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int s = 0; s < n_splits; s++) top = fmaxf(top, part_ml[(i64)s * lanes + lane].x);
#pragma unroll 4
  for (int s = 0; s < n_splits; s++) {
    const float2 ml = part_ml[(i64)s * lanes + lane];
    const float4 x = part_out[(i64)s * lanes * (N_V / 4) + e];
    const float weight = ex2(ml.x - top);
    sum += weight * ml.y;
    v.x += weight * x.x;
    v.y += weight * x.y;
    v.z += weight * x.z;
    v.w += weight * x.w;
  }
  float* to = out + lane / n_head * out_tok + lane % n_head * out_head + e % (N_V / 4) * 4;
  const float inverse = 1.f / sum;
  to[0] = v.x * inverse;
  to[1] = v.y * inverse;
  to[2] = v.z * inverse;
  to[3] = v.w * inverse;
}
