// What the card can multiply, from registers: 8 independent chains a thread (a warp, for tensor cores).
//
//   grid (multiprocessors * 8), 256 threads; peak_bf16 is f16 on Turing
#include "prims.cuh"

constexpr int THREADS = 256, CHAINS = 8;

KERNEL(THREADS, 1, peak_bf16)(float* __restrict__ out, int n) {
#if __CUDA_ARCH__ >= 800 || defined(CPU_SHIM)
  typedef BF16 T;
#else
  typedef F16 T;
#endif
  float c[CHAINS][4];
  const u32 a[4] = {threadIdx.x, 1, 2, 3};
  for (int j = 0; j < CHAINS; j++)
    for (int e = 0; e < 4; e++) c[j][e] = 0.f;
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < CHAINS; j++) mma16816<T>(c[j], a, (u32)i, (u32)j);
  float sum = 0.f;
  for (int j = 0; j < CHAINS; j++) sum += c[j][0] + c[j][1] + c[j][2] + c[j][3];
  out[blockIdx.x * THREADS + threadIdx.x] = sum;
}

KERNEL(THREADS, 1, peak_int8)(float* __restrict__ out, int n) {
  int c[CHAINS];
  for (int j = 0; j < CHAINS; j++) c[j] = j;
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < CHAINS; j++) c[j] = __dp4a((int)threadIdx.x + j, i, c[j]);
  int sum = 0;
  for (int j = 0; j < CHAINS; j++) sum += c[j];
  out[blockIdx.x * THREADS + threadIdx.x] = (float)sum;
}

KERNEL(THREADS, 1, peak_f32)(float* __restrict__ out, int n) {
  float c[CHAINS];
  const float a = threadIdx.x;
  for (int j = 0; j < CHAINS; j++) c[j] = j;
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < CHAINS; j++) c[j] = c[j] * a + (float)j;
  float sum = 0.f;
  for (int j = 0; j < CHAINS; j++) sum += c[j];
  out[blockIdx.x * THREADS + threadIdx.x] = sum;
}
