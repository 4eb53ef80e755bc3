// The tiles of mla_decode_wgmma.cu: where they are in shared memory, and the warpgroup that fetches them.
//
//   tile     9 pieces of 64 values of 64 rows, each in atoms of 8 rows x 128 bytes (wgmma.cuh); the last is the rope. For a
//            row that no token sees there is something finite, of weight 0: zeros, or row 0
//   buffers  two; tiles t_beg, t_beg + 2 … are in the first
//   parts    of buffer w: 0 is the half of the latents whose columns warpgroup w sums up, 1 the other half and the rope. A
//            part is fetched when EMPTY says that the warpgroup of its columns has used it; FULL says that it is there
//
// What did not help: lines asked for two tiles ahead, to the L2 cache (98.7 -> 112 µs: rows come at 2.6 TB/s already);
// parts of a quarter (95.1 against 96.2 µs, q8 134 against 126). What did: rows are the first that the L2 cache throws
// out, so that results of splits stay there (98.5 -> 94.2); queries before the second tile (95.1 -> 93.5).
constexpr int LANES = 64, THREADS = 384, HALF = C / 2, ATOM = 1024;
constexpr int PIECE = TOKENS * 128, PIECES = 9, ROPE = 8, TILE = PIECES * PIECE;
constexpr int AT_Q = 2 * TILE, AT_P = AT_Q + TILE, AT_MAX = AT_P + PIECE, AT_SUM = AT_MAX + 2 * LANES * 4;
constexpr int AT_BARRIERS = AT_SUM + 2 * LANES * 4;
constexpr int OF_PRODUCTS = 208, OF_FETCHING = 504 - 2 * OF_PRODUCTS;  // registers; each begins with 168
enum { FULL, EMPTY = 4, P_OF_A = 8, P_OF_B, BOTH, BARRIERS };  // FULL, EMPTY + 2 * buffer + part
static_assert(AT_BARRIERS + 8 * BARRIERS == SHARED_BYTES, "attention.py counts differently");
static_assert(C == 512 && R <= 64 && R % 8 == 0 && TOKENS == 64, "shape");

DEVICE int half_of(int w, int part) { return part == 0 ? w : 1 - w; }

struct Range { int t_beg, t_end, last; };  // tiles, and rows that any token sees

DEVICE void fetch_16_bits(const u8* rows, i64 row_stride, Range range, saddr sm) {
  const int r = (threadIdx.x & 127) >> 3, c = threadIdx.x & 7;  // 8 threads copy 128 bytes of a row; 16 rows at once
  const saddr barriers = sm + AT_BARRIERS, to = sm + r * 128 + ((c ^ (r & 7)) << 4);
  const u64 policy = evict_first();
  int phase = 1;
  for (int t = range.t_beg; t < range.t_end; t += 2, phase ^= 1)
#pragma unroll
    for (int w = 0; w < 2; w++) {
      if (t + w >= range.t_end) break;
      if (w == 1 && t == range.t_beg) barrier_wait(barriers + 8 * BOTH, 0);  // queries come before the second tile
      const u8* from[4];
      bool ok[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int tok = (t + w) * TOKENS + r + 16 * j;
        ok[j] = tok < range.last;
        from[j] = rows + (ok[j] ? tok : 0) * row_stride + c * 16;
      }
#pragma unroll
      for (int part = 0; part < 2; part++) {
        if (t > range.t_beg) barrier_wait(barriers + 8 * (EMPTY + 2 * w + part), phase);
        const int half = half_of(w, part);
#pragma unroll
        for (int p = 0; p < 4; p++)
#pragma unroll
          for (int j = 0; j < 4; j++)
            cp_async16(to + w * TILE + (4 * half + p) * PIECE + j * 2 * ATOM, from[j] + (4 * half + p) * 128, ok[j], policy);
        if (part == 1) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const bool in_row = c < R / 8;
            cp_async16(to + w * TILE + ROPE * PIECE + j * 2 * ATOM, from[j] + (in_row ? 2 * C : 0), ok[j] && in_row, policy);
          }
        }
        barrier_arrive_copied(barriers + 8 * (FULL + 2 * w + part));
      }
    }
}

// Raw bytes are a part ahead, in registers: rows r and r + 32, 16 bytes of every 64.
DEVICE void fetch_q8(const u8* rows, i64 row_stride, Range range, saddr sm_at, char* sm) {
  const int r = (threadIdx.x & 127) >> 2, c = threadIdx.x & 3;
  const saddr barriers = sm_at + AT_BARRIERS;
  char* to[2] = {sm + r * 128 + (((2 * c) ^ (r & 7)) << 4), sm + r * 128 + (((2 * c + 1) ^ (r & 7)) << 4)};
  const u64 policy = evict_first();
  const u8* from[2];
  uint4 raw[2][4], rope[2][2];
  u32 scale2[2];
  auto go_to = [&](int t) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int tok = t * TOKENS + r + 32 * j;
      from[j] = rows + (t < range.t_end && tok < range.last ? tok : 0) * row_stride;
      const float scale = __ldg((const float*)(from[j] + C + 2 * R));
      scale2[j] = pack2<F16>(scale, scale);
    }
  };
  auto next_raw = [&](int j, int half, int q) { raw[j][q] = load_16(from[j] + half * HALF + q * 64 + c * 16, policy); };
  go_to(range.t_beg);
#pragma unroll
  for (int i = 0; i < 8; i++) next_raw(i / 4, 0, i % 4);
  int phase = 1;
  for (int t = range.t_beg; t < range.t_end; t += 2, phase ^= 1)
#pragma unroll
    for (int w = 0; w < 2; w++) {
      if (t + w >= range.t_end) break;
#pragma unroll
      for (int part = 0; part < 2; part++) {
        if (t > range.t_beg) barrier_wait(barriers + 8 * (EMPTY + 2 * w + part), phase);
        const u32 scale_now[2] = {scale2[0], scale2[1]};
        if (part == 0) {
#pragma unroll
          for (int i = 0; i < 4; i++)
            rope[i / 2][i % 2] = load_16(from[i / 2] + C + min(2 * c + i % 2, R / 8 - 1) * 16, policy);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++)
            *(uint4*)(to[i % 2] + w * TILE + ROPE * PIECE + i / 2 * 4 * ATOM) = widened_rope(rope[i / 2][i % 2]);
          go_to(t + w + 1);
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {  // both rows at once, for what is computed of them to overlap
          uint4 wide[2][2];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            wide[j][0] = widened_latent(raw[j][q].x, raw[j][q].y, scale_now[j]);
            wide[j][1] = widened_latent(raw[j][q].z, raw[j][q].w, scale_now[j]);
            next_raw(j, part == 1 ? half_of(1 - w, 0) : half_of(w, 1), q);
          }
#pragma unroll
          for (int i = 0; i < 4; i++)
            *(uint4*)(to[i % 2] + w * TILE + (4 * half_of(w, part) + q) * PIECE + i / 2 * 4 * ATOM) = wide[i / 2][i % 2];
        }
        fence_async();
        barrier_arrive(barriers + 8 * (FULL + 2 * w + part));
      }
    }
}
