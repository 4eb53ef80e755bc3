// The operations that move few bytes: norm, rope, SwiGLU.
//
//   rms_norm  grid (tokens), 256 threads, 32 bytes      out = x / sqrt(mean x^2 + eps) * weight
//   rope      grid (tokens), 256 threads                every pair of every head turned; out may be x
//   swiglu    grid (n / 1024, tokens), 256 threads      out = silu(gate) * up; out may be gate
#include "prims.cuh"
#include "reduce.cuh"
#include "rotation.cuh"

KERNEL(256, 1, rms_norm)(
    const float* x, i64 x_tok, const float* __restrict__ weight, float eps, float* out, i64 out_tok, int n) {
  DYN_SMEM(smem);
  x += blockIdx.x * x_tok;
  out += blockIdx.x * out_tok;
  float squares = 0.f;
  for (int i = threadIdx.x; i < n; i += 256) squares += x[i] * x[i];
  const float factor = 1.f / sqrtf(block_sum<256>(squares, (float*)smem) / n + eps);
  for (int i = threadIdx.x; i < n; i += 256) out[i] = x[i] * factor * weight[i];
}

KERNEL(256, 1, rope)(
    const float* x, i64 x_tok, i64 x_head, const float* __restrict__ cos_sin, i64 cos_sin_tok, float* out, i64 out_tok,
    i64 out_head, int n_head, int n_rot, int neox) {
  x += blockIdx.x * x_tok;
  out += blockIdx.x * out_tok;
  cos_sin += blockIdx.x * cos_sin_tok;
  const int half = n_rot / 2;
  for (int i = threadIdx.x; i < n_head * half; i += 256) {
    const int head = i / half, j = i % half;
    const Pair p = pair_at(j, n_rot, neox);
    const float2 v = turned(x[head * x_head + p.a], x[head * x_head + p.b], cos_sin, j, n_rot);
    out[head * out_head + p.a] = v.x;
    out[head * out_head + p.b] = v.y;
  }
}

KERNEL(256, 1, swiglu)(
    const float* gate, i64 gate_tok, const float* __restrict__ up, i64 up_tok, float* out, i64 out_tok, int n) {
  gate += blockIdx.y * gate_tok;
  up += blockIdx.y * up_tok;
  out += blockIdx.y * out_tok;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = blockIdx.x * 1024 + k * 256 + threadIdx.x;
    if (i < n) out[i] = gate[i] / (1.f + expf(-gate[i])) * up[i];
  }
}
