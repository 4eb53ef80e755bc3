// Rows of the K-cache: written (k_store), turned (k_shift); and the rotation that type_k q8 keeps its latent under.
//
//   k_store       grid (tokens), 128 threads, 4 (C + R + 4) bytes of dynamic shared memory
//   k_shift       grid (rows), 32 threads
//   rotate_heads  grid (tokens * heads), 128 threads, 4 C bytes
//
//   16-bit row    [ weight * c | rope ]                                   c = latent / rms
//   q8 row        [ int8 of H c, stored + 128 | rope bf16 | f32 scale ]   H: hadamard.cuh
//
// Defines: KV_LORA_RANK N_ROT TYPE_K (0 f16, 1 bf16, 2 q8)
#include "prims.cuh"
#include "reduce.cuh"
#include "rotation.cuh"
#include "hadamard.cuh"

constexpr int C = KV_LORA_RANK, R = N_ROT, THREADS = 128;
constexpr int ROPE_AT = TYPE_K == 2 ? C : 2 * C;

DEVICE u16 to_16(float v) {
  return TYPE_K == 0 ? f32_to_f16(fminf(fmaxf(v, -65504.f), 65504.f)) : f32_to_bf16(v);
}

KERNEL(THREADS, 1, k_store)(
    const float* __restrict__ kv_a, i64 kv_a_tok, const float* __restrict__ weight, float eps,
    const float* __restrict__ cos_sin, i64 cos_sin_tok, const int* __restrict__ positions, u8* __restrict__ rows,
    i64 row_stride, int neox) {
  DYN_SMEM(smem);
  float* c = (float*)smem;
  float* rope = c + C;
  float* red = rope + R;
  const int tid = threadIdx.x;
  kv_a += blockIdx.x * kv_a_tok;
  cos_sin += blockIdx.x * cos_sin_tok;
  u8* row = rows + positions[blockIdx.x] * row_stride;
  float squares = 0.f;
  for (int i = tid; i < C; i += THREADS) {
    const float v = kv_a[i];
    c[i] = v;
    squares += v * v;
  }
  const float factor = 1.f / sqrtf(block_sum<THREADS>(squares, red) / C + eps);
  for (int j = tid; j < R / 2; j += THREADS) {
    const Pair p = pair_at(j, R, neox);
    const float2 v = turned(kv_a[C + p.a], kv_a[C + p.b], cos_sin, j, R);
    rope[p.a] = v.x;
    rope[p.b] = v.y;
  }
  if (TYPE_K == 2) {
    for (int i = tid; i < C; i += THREADS) c[i] *= factor;
    hadamard<C, THREADS>(c);
    float top = 1e-30f;
    for (int i = tid; i < C; i += THREADS) top = fmaxf(top, fabsf(c[i]));
    const float scale = block_max<THREADS>(top, red) / 127.f, inverse = 1.f / scale;
    for (int i = 4 * tid; i < C; i += 4 * THREADS) {
      u32 four = 0;
      for (int j = 0; j < 4; j++) four |= (u32)((int)rintf(c[i + j] * inverse) + 128) << 8 * j;
      *(u32*)(row + i) = four;
    }
    if (tid == 0) *(float*)(row + C + 2 * R) = scale;
  } else {
    __syncthreads();
    for (int i = 2 * tid; i < C; i += 2 * THREADS)
      *(u32*)(row + 2 * i) = to_16(c[i] * factor * weight[i]) | (u32)to_16(c[i + 1] * factor * weight[i + 1]) << 16;
  }
  for (int i = 2 * tid; i < R; i += 2 * THREADS)
    *(u32*)(row + ROPE_AT + 2 * i) = to_16(rope[i]) | (u32)to_16(rope[i + 1]) << 16;
}

// rope (n, R) of 16 bits, turned, becomes the rope part of the first n rows
KERNEL(32, 1, k_shift)(
    const u16* __restrict__ rope, const float* __restrict__ cos_sin, i64 cos_sin_tok, u8* __restrict__ rows, i64 row_stride,
    int neox) {
  rope += (i64)blockIdx.x * R;
  cos_sin += blockIdx.x * cos_sin_tok;
  u16* out = (u16*)(rows + blockIdx.x * row_stride + ROPE_AT);
  for (int j = threadIdx.x; j < R / 2; j += 32) {
    const Pair p = pair_at(j, R, neox);
    const u16 a = rope[p.a], b = rope[p.b];
    const float2 v = TYPE_K == 0 ? turned(f16_to_f32(a), f16_to_f32(b), cos_sin, j, R)
                                 : turned(bf16_to_f32(a), bf16_to_f32(b), cos_sin, j, R);
    out[p.a] = to_16(v.x);
    out[p.b] = to_16(v.y);
  }
}

// the first C values of each head: x = H (weight * x), or, inverse, weight * H x
KERNEL(THREADS, 1, rotate_heads)(
    float* __restrict__ x, i64 x_tok, i64 x_head, int n_head, const float* __restrict__ weight, int inverse) {
  DYN_SMEM(smem);
  float* v = (float*)smem;
  x += blockIdx.x / n_head * x_tok + blockIdx.x % n_head * x_head;
  for (int i = threadIdx.x; i < C; i += THREADS) v[i] = inverse ? x[i] : x[i] * weight[i];
  hadamard<C, THREADS>(v);
  for (int i = threadIdx.x; i < C; i += THREADS) x[i] = inverse ? v[i] * weight[i] : v[i];
}
