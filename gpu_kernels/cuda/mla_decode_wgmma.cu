// mla_decode for many lanes on Hopper (sm_90a): the same as mla_decode.cu, by products of warpgroups.
//
// mla_split    grid (splits, lanes / 64), 384 threads, SHARED_BYTES of dynamic shared memory
// mla_combine  as mla.cuh says
//
// A block holds 64 lanes (token, head) and a range of tiles of 64 rows, two at a time, a and b. Of three warpgroups the
// last fetches them (mla_tiles.cuh), the others sum up half of the columns each:
//
//   warpgroup 0                              warpgroup 1
//   scores of a   = q · a                    scores of b   = q · b
//   softmax of a, P to shared memory  ──►
//   out[0:256]   += P · a[0:256]             out[256:512] += P · a[256:512]     softmax of b meanwhile
//                                     ◄──    P to shared memory
//   out[0:256]   += P · b[0:256]             out[256:512] += P · b[256:512]
//
// so that either's softmax goes on beside products of the other, and the next tiles are fetched half by half: queries and
// two tiles are all that shared memory holds. Maxima are handed over with P, and both warpgroups scale their outputs by
// the same numbers, in the order of the tiles. A tile is one operand of both products: rows are K-major for scores, and
// transposed for values. P of b is written over the rope of b.
//
// Defines: KV_LORA_RANK (512) N_ROT (at most 64) TYPE_K (0 f16, 1 bf16, 2 q8) TOKENS (64) SHARED_BYTES
#include "wgmma.cuh"
#include "mla.cuh"
#include "mla_tiles.cuh"

// Of a warp's 16 lanes, a thread has two, g and g + 8 with g = lane / 4, and of 8 tokens or columns two, 2 (lane % 4).
struct Lanes {
  float m[2], l[2], fade[2];  // maxima, in powers of two; sums over this thread's tokens; what the last maxima scale by
  int lim[2];                 // rows that they see
};

DEVICE void go_to(Lanes& x, float top, int h) {  // the maximum from now on
  x.fade[h] = ex2(x.m[h] - (top == NEG_INF ? 0.f : top));
  x.m[h] = top;
  x.l[h] *= x.fade[h];
}

// p: powers of 64 tokens' scores as registers of a, for four products
DEVICE void softmax(u32 (&p)[16], Lanes& x, float (&s)[32], int first, bool all_seen) {
  if (!all_seen) {
#pragma unroll
    for (int i = 0; i < 32; i++)
      if (first + i / 4 * 8 + 2 * ((int)threadIdx.x & 3) + (i & 1) >= x.lim[i >> 1 & 1]) s[i] = NEG_INF;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = x.m[h];
#pragma unroll
    for (int j = 0; j < 8; j++) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    go_to(x, top, h);
    const float use = top == NEG_INF ? 0.f : top;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++) {
        s[4 * j + e] = ex2(s[4 * j + e] - use);
        x.l[h] += s[4 * j + e];
      }
  }
#pragma unroll
  for (int i = 0; i < 16; i++) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);  // both: 8 tokens, lane, two tokens
}

DEVICE void scale_by(float (&o)[128], const float (&fade)[2]) {
  if (__any_sync(0xffffffffu, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
    for (int i = 0; i < 128; i++) o[i] *= fade[i >> 1 & 1];
  }
}

// Of a block, as a tile has its rows; lanes beyond the last are zeros.
DEVICE void load_queries(
    char* to, const float* q, i64 q_tok, i64 q_head, int n_head, int lane0, int n_lanes, float scale, int warp, int lane) {
  constexpr int AT_ONCE = 4;  // rows whose loads are under way together: 98.5 µs, one by one 105
#pragma unroll 1
  for (int r = warp; r < LANES; r += 8 * AT_ONCE) {
    float4 v[AT_ONCE][3][2];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int l = lane0 + r + 8 * j;
      const float4* from = l < n_lanes ? (const float4*)(q + l / n_head * q_tok + l % n_head * q_head) : nullptr;
#pragma unroll
      for (int i = 0; i < 6; i++) {
        const int c = i / 2 * 32 + lane;  // of chunks of eight values
        v[j][i / 2][i % 2] = from && c < (C + R) / 8 ? from[2 * c + i % 2] : make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
      for (int i = 0; i < 3; i++) {
        const int c = i * 32 + lane;
        const float4 x = v[j][i][0], y = v[j][i][1];
        if (c < PIECES * 8)
          *(uint4*)(to + c / 8 * PIECE + (r + 8 * j) * 128 + ((c % 8 ^ (r & 7)) << 4)) =
              make_uint4(pack2<T>(x.x * scale, x.y * scale), pack2<T>(x.z * scale, x.w * scale),
                         pack2<T>(y.x * scale, y.y * scale), pack2<T>(y.z * scale, y.w * scale));
      }
  }
}

KERNEL(THREADS, 1, mla_split)(
    const float* __restrict__ q, i64 q_tok, i64 q_head, const u8* __restrict__ rows, i64 row_stride,
    const int* __restrict__ n_kv, int n_tok, int n_head, float scale_log2, float* __restrict__ part_out,
    float2* __restrict__ part_ml) {
  DYN_SMEM(smem_raw);
  char* sm = (char*)smem_raw;
  const saddr at = smem_addr(sm), barriers = at + AT_BARRIERS;
  const int tid = threadIdx.x, lane = tid & 31;
  const int n_lanes = n_tok * n_head, lane0 = blockIdx.y * LANES, split = blockIdx.x;
  const int tok_beg = lane0 / n_head, tok_end = min(n_tok, (lane0 + LANES - 1) / n_head + 1);
  const int per = tiles_per_split(n_kv, n_tok, gridDim.x);
  Range range;
  range.last = longest(n_kv, tok_beg, tok_end);
  range.t_beg = split * per;
  range.t_end = min((range.last + TOKENS - 1) / TOKENS, range.t_beg + per);
  if (range.t_beg >= range.t_end) return;
  if (tid == 0) {
    for (int i = 0; i < 4; i++) {
      barrier_init(barriers + 8 * (FULL + i), 128);
      barrier_init(barriers + 8 * (EMPTY + i), 128);
    }
    barrier_init(barriers + 8 * P_OF_A, 256);  // and scores of b are done, so that its rope is no longer needed
    barrier_init(barriers + 8 * P_OF_B, 128);
    barrier_init(barriers + 8 * BOTH, 256);
  }
  __syncthreads();
  if (tid >= 256) {
    fewer_registers<OF_FETCHING>();
    if (IS_Q8) fetch_q8(rows, row_stride, range, at, sm);
    else fetch_16_bits(rows, row_stride, range, at);
    return;
  }
  more_registers<OF_PRODUCTS>();
  const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0), w = warp >> 2, row = warp & 3;  // warpgroup; 16 lanes from 16 row on
  load_queries(sm + AT_Q, q, q_tok, q_head, n_head, lane0, n_lanes, scale_log2, warp, lane);
  fence_async();
  barrier_arrive(barriers + 8 * BOTH);

  Lanes x;
  int least = range.last;  // rows that every token sees
  for (int t = tok_beg; t < tok_end; t++) least = min(least, n_kv[t]);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int l = lane0 + 16 * row + (lane >> 2) + 8 * h;
    x.lim[h] = l < n_lanes ? n_kv[l / n_head] : 0;
    x.m[h] = NEG_INF;
    x.l[h] = 0.f;
  }
  float o[128];
#pragma unroll
  for (int i = 0; i < 128; i++) o[i] = 0.f;

  constexpr u32 STEP = 16 * 2 >> 4, PIECES_ON = PIECE >> 4, ROWS_ON = 2 * ATOM >> 4;  // of a matrix: 16 values, 64, 16 rows
  const u64 q_at = matrix(at + AT_Q, 16, ATOM), k_at = matrix(at + w * TILE, 16, ATOM);
  const u64 p_of_a = matrix(at + AT_P, 16, ATOM), p_of_b = matrix(at + TILE + ROPE * PIECE, 16, ATOM);
  const u64 a_at = matrix(at + w * 4 * PIECE, PIECE, ATOM), b_at = matrix(at + TILE + w * 4 * PIECE, PIECE, ATOM);
  float* maxima = (float*)(sm + AT_MAX) + 16 * row + (lane >> 2);
  auto scores = [&](float (&s)[32], int phase) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      barrier_wait(barriers + 8 * (FULL + 2 * w + part), phase);
      fence_async();
      const u64 a = afresh(q_at + 4 * half_of(w, part) * PIECES_ON), b = afresh(k_at + 4 * half_of(w, part) * PIECES_ON);
      products_begin();
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const u32 on = i / 4 * PIECES_ON + i % 4 * STEP;
        product_64<T>(s, a + on, b + on, part + i > 0);
      }
      if (part == 1) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          product_64<T>(s, q_at + ROPE * PIECES_ON + i * STEP, k_at + ROPE * PIECES_ON + i * STEP, true);
      }
    }
    products_commit();
    products_wait<0>(s);
  };
  auto hand_over = [&](const u32 (&p)[16], char* memory, int tile) {  // P and the maxima
    u32* to = (u32*)(memory + (16 * row + (lane >> 2)) * 128) + (lane & 3);
#pragma unroll
    for (int i = 0; i < 16; i++) to[(i & 1) * 8 * 32 + ((i >> 1 ^ lane >> 2) << 2)] = p[i];
    if ((lane & 3) == 0)
      for (int h = 0; h < 2; h++) maxima[tile * LANES + 8 * h] = x.m[h];
    fence_async();
    barrier_arrive(barriers + 8 * (P_OF_A + tile));
  };
  auto take_over = [&](int tile, int phase) {
    barrier_wait(barriers + 8 * (P_OF_A + tile), phase);
    for (int h = 0; h < 2; h++) go_to(x, maxima[tile * LANES + 8 * h], h);
    scale_by(o, x.fade);
  };
  auto own_values = [&](const u32 (&p)[16], u64 v_at) {
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) product_256<T>(o, p + 4 * k, v_at + k * ROWS_ON);
    products_commit();
  };
  auto other_values = [&](u64 p_at, u64 v_at) {
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) product_256<T>(o, p_at + k * STEP, v_at + k * ROWS_ON);
    products_commit();
  };
  auto used = [&](int buffer, int part) {
    products_wait<0>(o);
    barrier_arrive(barriers + 8 * (EMPTY + 2 * buffer + part));
  };

  barrier_wait(barriers + 8 * BOTH, 0);
  int phase = 0;
  for (int t = range.t_beg; t < range.t_end; t += 2, phase ^= 1) {
    const bool has_b = t + 1 < range.t_end;
    float s[32];
    u32 p[16];
    if (w == 0) {
      scores(s, phase);
      softmax(p, x, s, t * TOKENS, (t + 1) * TOKENS <= least);
      hand_over(p, sm + AT_P, 0);
      scale_by(o, x.fade);
      own_values(p, a_at);
      used(0, 0);
      if (has_b) {
        take_over(1, phase);
        other_values(p_of_b, b_at);
        used(1, 1);
      }
    } else {
      if (has_b) scores(s, phase);
      barrier_arrive(barriers + 8 * P_OF_A);
      take_over(0, phase);
      other_values(p_of_a, a_at);
      if (has_b) {
        softmax(p, x, s, (t + 1) * TOKENS, (t + 2) * TOKENS <= least);
        hand_over(p, sm + TILE + ROPE * PIECE, 1);
      }
      used(0, 1);
      if (has_b) {
        scale_by(o, x.fade);
        own_values(p, b_at);
        used(1, 0);
      }
    }
  }

  float* sums = (float*)(sm + AT_SUM) + 16 * row + (lane >> 2);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    x.l[h] += __shfl_xor_sync(0xffffffffu, x.l[h], 1);
    x.l[h] += __shfl_xor_sync(0xffffffffu, x.l[h], 2);
    if ((lane & 3) == 0) sums[w * LANES + 8 * h] = x.l[h];
  }
  barrier_arrive(barriers + 8 * BOTH);
  barrier_wait(barriers + 8 * BOTH, 1);
  // through shared memory, which nobody uses any longer: eight bytes a thread would reach global memory at half its pace
  constexpr int PITCH = HALF * 4 + 32;  // of a lane: stores of eight bytes meet no bank conflicts
  char* outputs = sm + w * TILE + 16 * row * PITCH;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = sums[8 * h] + sums[LANES + 8 * h], inverse = sum > 0.f ? 1.f / sum : 0.f;
    const int l = lane0 + 16 * row + (lane >> 2) + 8 * h;
    if (w == 0 && (lane & 3) == 0 && l < n_lanes) part_ml[(i64)split * n_lanes + l] = make_float2(x.m[h], sum);
    float* to = (float*)(outputs + ((lane >> 2) + 8 * h) * PITCH) + 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < 32; j++)
      *(float2*)(to + 8 * j) = make_float2(o[4 * j + 2 * h] * inverse, o[4 * j + 2 * h + 1] * inverse);
  }
  fence_async();
  __syncwarp();
  const int l = lane0 + 16 * row + lane;
  if (lane < 16 && l < n_lanes) {
    bulk_store(part_out + ((i64)split * n_lanes + l) * C + w * HALF, smem_addr(outputs + lane * PITCH), HALF * 4);
    bulk_wait();
  }
}
