// split: one field of quantised blocks, taken out of all of them: to[i, j] = blocks[i, at + j], in units of two bytes
//
//   grid (ceil(values / 256)), 256 threads
#include "prims.cuh"

KERNEL(256, 1, split)(const u16* __restrict__ blocks, int block, int at, u16* __restrict__ to, int n, i64 n_values) {
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i < n_values) to[i] = blocks[i / n * block + at + i % n];
}
