// Sums and maxima over a warp and over a block.
DEVICE float warp_sum(float v) {
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
DEVICE float warp_max(float v) {
  for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}
// of N threads; every thread gets it; red is N / 32 floats of shared memory, free again afterwards
template <int N> DEVICE float block_sum(float v, float* red) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = v;
  __syncthreads();
  v = 0.f;
  for (int i = 0; i < N / 32; i++) v += red[i];
  __syncthreads();
  return v;
}
template <int N> DEVICE float block_max(float v, float* red) {
  v = warp_max(v);
  if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = v;
  __syncthreads();
  for (int i = 0; i < N / 32; i++) v = fmaxf(v, red[i]);
  __syncthreads();
  return v;
}
