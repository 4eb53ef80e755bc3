// What experts needs beside products. A slot is a pair (token, choice); sorted by expert, slots have positions.
//
//   sort_slots     grid (experts), 512 threads    positions of each expert's slots, in the order of slots: order (slots)
//                                                 slot at a position, place (slots) position of a slot; and
//                                                 tiles (n_slots / tokens + experts): expert, first and last position, 0
//                                                 of experts begin … begin + the grid's; slots of others have no position
//   narrow_swiglu  grid (slots, ceil(n_out / 2048)), 256 threads    silu(gate) * up in 16 bits, zeros from n on
//   add_slots      grid (ceil(n / 256), tokens), 256 threads        out[t] += sum over the slots s of token t, in the
//                                                                   order of choice, of weight[t, s] * slots[place[t, s]]
#include "prims.cuh"
#include "narrow.cuh"

// A block finds its expert's slots alone: it counts those of the experts before. Tiles of expert e begin at
// first / tokens + e, which leaves room for all tiles before it; those left over are empty (first = last), also those
// after the last expert's: slots of experts that are not here have none.
KERNEL(512, 1, sort_slots)(
    const int* __restrict__ ids, int n_slots, int begin, int tokens, int* __restrict__ order, int* __restrict__ place,
    int4* __restrict__ tiles) {
  constexpr int WARPS = 16;
  DYN_SMEM(smem);
  int* s_before = (int*)smem;  // by warp: slots of experts before this one, and of this one
  int* s_mine = s_before + WARPS;
  const int e = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int each = (n_slots + 32 * WARPS - 1) / (32 * WARPS) * 32;
  const int from = warp * each, to = min(from + each, n_slots);
  int before = 0, mine = 0;
  for (int i = from; i < to; i += 32) {
    const int id = i + lane < to ? __ldg(ids + i + lane) - begin : -1;
    before += __popc(__ballot_sync(0xffffffffu, (u32)id < (u32)e));
    mine += __popc(__ballot_sync(0xffffffffu, id == e));
  }
  if (lane == 0) {
    s_before[warp] = before;
    s_mine[warp] = mine;
  }
  __syncthreads();
  int first = 0, last = 0, at = 0;
  for (int w = 0; w < WARPS; w++) {
    first += s_before[w];
    last += s_mine[w];
    if (w < warp) at += s_mine[w];
  }
  at += first;
  last += first;
  for (int i = from; i < to; i += 32) {
    const bool is_mine = i + lane < to && __ldg(ids + i + lane) - begin == e;
    const u32 all = __ballot_sync(0xffffffffu, is_mine);
    const int p = at + __popc(all & ((1u << lane) - 1));
    if (is_mine) {
      order[p] = i + lane;
      place[i + lane] = p;
    }
    at += __popc(all);
  }
  const int first_tile = first / tokens + e;
  const int end = e + 1 < (int)gridDim.x ? last / tokens + e + 1 : n_slots / tokens + gridDim.x;
  for (int j = first_tile + threadIdx.x; j < end; j += 512) {
    const int p = min(first + (j - first_tile) * tokens, last);
    tiles[j] = make_int4(e, p, min(p + tokens, last), 0);
  }
}

KERNEL(256, 1, narrow_swiglu)(
    const float* __restrict__ gate, const float* __restrict__ up, int n, u16* __restrict__ out, int n_out, int is_f16) {
  const int i = (blockIdx.y * 256 + threadIdx.x) * 8;
  if (i >= n_out) return;
  float4 v[2] = {make_float4(0.f, 0.f, 0.f, 0.f), make_float4(0.f, 0.f, 0.f, 0.f)};
  if (i < n) {
    auto times = [](float g, float u) { return g / (1.f + expf(-g)) * u; };
    const i64 at = ((i64)blockIdx.x * n + i) / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float4 g = __ldg((const float4*)gate + at + h), u = __ldg((const float4*)up + at + h);
      v[h] = make_float4(times(g.x, u.x), times(g.y, u.y), times(g.z, u.z), times(g.w, u.w));
    }
  }
  *(uint4*)(out + (i64)blockIdx.x * n_out + i) = narrow_8(v[0], v[1], is_f16);
}

KERNEL(256, 1, add_slots)(
    const float* __restrict__ slots, const int* __restrict__ place, const int* __restrict__ ids, int begin, int n_expert,
    const float* __restrict__ weights, int n_used, float* __restrict__ out, i64 out_tok, int n) {
  const int i = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
  if (i >= n) return;
  float sum = 0.f;
  for (int s = 0; s < n_used; s++) {
    const int slot = t * n_used + s;
    if ((u32)(ids[slot] - begin) >= (u32)n_expert) continue;
    sum += weights[slot] * slots[(i64)(place ? place[slot] : slot) * n + i];
  }
  out[t * out_tok + i] += sum;
}
