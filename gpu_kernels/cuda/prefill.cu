// What mla_prefill prepares for mla_decode.cu.
//
//   copy_rope   grid (tokens * heads), 32 threads       the last n_rot values of each head of q, to out
//   count_rows  grid (1), 64 threads                    n_kv[t] = first + t + 1
#include "prims.cuh"

KERNEL(32, 1, copy_rope)(
    const float* __restrict__ q, i64 q_tok, i64 q_head, float* __restrict__ out, i64 out_tok, i64 out_head, int n_head,
    int n_rot) {
  q += blockIdx.x / n_head * q_tok + blockIdx.x % n_head * q_head;
  out += blockIdx.x / n_head * out_tok + blockIdx.x % n_head * out_head;
  for (int i = threadIdx.x; i < n_rot; i += 32) out[i] = q[i];
}

KERNEL(64, 1, count_rows)(int* n_kv, int first, int n) {
  for (int t = threadIdx.x; t < n; t += 64) n_kv[t] = first + t + 1;
}
