// x (N floats in shared memory) is multiplied by an orthonormal Walsh-Hadamard matrix, in place, by THREADS threads: of the
// largest power of two that divides N, block by block. Starts and ends with a barrier.
template <int N, int THREADS> DEVICE void hadamard(float* x) {
  constexpr int BLOCK = N & -N;
  __syncthreads();
  for (int h = 1; h < BLOCK; h *= 2) {
    for (int p = threadIdx.x; p < N / 2; p += THREADS) {
      const int i = p / h * 2 * h + p % h;
      const float u = x[i], v = x[i + h];
      x[i] = u + v;
      x[i + h] = u - v;
    }
    __syncthreads();
  }
  const float factor = 1.f / sqrtf((float)BLOCK);
  for (int i = threadIdx.x; i < N; i += THREADS) x[i] *= factor;
  __syncthreads();
}
