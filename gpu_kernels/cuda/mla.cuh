// What the kernels of mla_decode have in common: their types, how they share the rows out, and what merges the splits.
//
// mla_combine  grid (lanes, C / 128), 256 threads, 4 (splits + 16 + 8 * 128) bytes of dynamic shared memory
//
//   part_out  (splits, lanes, C) f32       of each split, divided by its sum
//   part_ml   (splits, lanes) two f32      its maximum and sum, in powers of two
//
// Defines: KV_LORA_RANK N_ROT TYPE_K (0 f16, 1 bf16, 2 q8) TOKENS (of a tile)
constexpr int C = KV_LORA_RANK, R = N_ROT;
constexpr bool IS_Q8 = TYPE_K == 2;
template <int> struct Value { typedef F16 T; };
template <> struct Value<1> { typedef BF16 T; };
typedef Value<TYPE_K>::T T;  // what is multiplied

// the greatest n_kv of some tokens
DEVICE int longest(const int* n_kv, int begin, int end) {
  int found = 0;
  for (int t = begin; t < end; t++) found = n_kv[t] > found ? n_kv[t] : found;
  return found;
}
// tiles of the longest token, per split
DEVICE int tiles_per_split(const int* n_kv, int n_tok, int n_splits) {
  return ((longest(n_kv, 0, n_tok) + TOKENS - 1) / TOKENS + n_splits - 1) / n_splits;
}

// of a q8 row, as f16: eight bytes of the latent, each (byte - 128) times the row's scale (twice), and eight values of rope
DEVICE uint4 widened_latent(u32 low, u32 high, u32 scale2) {
  return make_uint4(mul_f16x2(bytes_to_f16x2(low, false), scale2), mul_f16x2(bytes_to_f16x2(low, true), scale2),
                    mul_f16x2(bytes_to_f16x2(high, false), scale2), mul_f16x2(bytes_to_f16x2(high, true), scale2));
}
DEVICE uint4 widened_rope(uint4 v) {
  auto two = [](u32 x) { return pack2<F16>(__int_as_float(x << 16), __int_as_float(x & 0xffff0000u)); };
  return make_uint4(two(v.x), two(v.y), two(v.z), two(v.w));
}

// out = sum of splits' outputs by weight l 2^(m - max) / sum; of a lane, exactly the splits before its n_kv have l > 0
KERNEL(256, 1, mla_combine)(
    const float* __restrict__ part_out, const float2* __restrict__ part_ml, const int* __restrict__ n_kv, int n_tok,
    int n_head, int n_splits, float* __restrict__ out, i64 out_tok, i64 out_head) {
  DYN_SMEM(smem_raw);
  float* red = (float*)smem_raw;  // 8 maxima, 8 sums, (8, 128) partial sums, n_splits weights
  float4* sums = (float4*)(red + 16);
  float* weight = red + 16 + 8 * 128;
  const int l = blockIdx.x, n_lanes = n_tok * n_head, tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  const int per = tiles_per_split(n_kv, n_tok, n_splits), lim = n_kv[l / n_head];
  const int n = lim > 0 ? ((lim + TOKENS - 1) / TOKENS + per - 1) / per : 0;
  float m = NEG_INF;
  for (int s = tid; s < n; s += 256) m = fmaxf(m, part_ml[(i64)s * n_lanes + l].x);
  for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
  if (lane == 0) red[w] = m;
  __syncthreads();
  for (int i = 0; i < 8; i++) m = fmaxf(m, red[i]);
  float sum = 0.f;
  for (int s = tid; s < n; s += 256) {
    const float2 e = part_ml[(i64)s * n_lanes + l];
    const float x = e.y * ex2(e.x - m);
    weight[s] = x;
    sum += x;
  }
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (lane == 0) red[8 + w] = sum;
  __syncthreads();
  sum = 0.f;
  for (int i = 0; i < 8; i++) sum += red[8 + i];
  const float inv = sum > 0.f ? 1.f / sum : 0.f;
  float4 a = make_float4(0.f, 0.f, 0.f, 0.f);
  const float4* from = (const float4*)(part_out + (i64)l * C) + blockIdx.y * 32 + lane;
#pragma unroll 4
  for (int s = w; s < n; s += 8) {
    const float x = weight[s];
    const float4 v = from[(i64)s * n_lanes * (C / 4)];
    a.x += x * v.x;
    a.y += x * v.y;
    a.z += x * v.z;
    a.w += x * v.w;
  }
  sums[w * 32 + lane] = a;
  __syncthreads();
  if (tid < 128) {
    float total = 0.f;
    for (int i = 0; i < 8; i++) total += ((float*)sums)[i * 128 + tid];
    out[l / n_head * out_tok + l % n_head * out_head + blockIdx.y * 128 + tid] = total * inv;
  }
}
