// The hardware instructions that kernels use, one function each, and the macros that make a kernel.
//
// Nothing else in these sources is CUDA's own beyond threadIdx, __syncthreads(), shuffles and __dp4a, and no header of a
// toolkit is included: NVRTC alone compiles them, and so does g++, where tests/gpu_kernels/shim.h gives every name here
// a meaning that is exact to the lane (it defines CPU_SHIM).
#ifndef CPU_SHIM
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define KERNEL(threads, blocks_per_sm, name) extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name
#define DEVICE __device__ __forceinline__
#define DYN_SMEM(name) extern __shared__ __align__(1024) uint4 name[]
// Until all that the kernel before this one has written is there; the next one may take its places from now on.
#if __CUDA_ARCH__ >= 900
#define AFTER_PREVIOUS asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory")
#else
#define AFTER_PREVIOUS
#endif
struct F16 { enum { is_bf16 = 0 }; };
struct BF16 { enum { is_bf16 = 1 }; };

typedef u32 saddr;  // an address in shared memory
DEVICE saddr smem_addr(const void* p) {
  u32 a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}

// 16 bytes from global to shared memory, later; zeros if not ok, and nothing is read
DEVICE void cp_async16(saddr dst, const void* src, bool ok) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(ok ? 16 : 0) : "memory");
#else
  uint4 v = ok ? *(const uint4*)src : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> DEVICE void cp_async_wait() {  // until at most the N latest groups are under way
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8
DEVICE void ldsm_x4(u32 (&r)[4], saddr p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}
DEVICE void ldsm_x4_t(u32 (&r)[4], saddr p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}

// c (16 x 8, f32) += a (16 x 16) times b (16 x 8)
template <class T> DEVICE void mma16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  if (T::is_bf16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing: two steps of 8, f16 only
  static_assert(!T::is_bf16 || sizeof(T) == 0, "bf16 needs sm_80");
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

DEVICE float f16_to_f32(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 f32_to_f16(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE float bf16_to_f32(u16 h) { return __int_as_float((u32)h << 16); }
DEVICE u16 f32_to_bf16(float f) {  // to the nearest even; without cvt, which sm_75 lacks
  u32 u = __float_as_uint(f);
  return f != f ? 0x7fff : (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
// two values in 16 bits each, lo in the low half
template <class T> DEVICE u32 pack2(float lo, float hi) {
  if (!T::is_bf16) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#else
    return (u32)f32_to_f16(lo) | (u32)f32_to_f16(hi) << 16;
#endif
  }
#if __CUDA_ARCH__ >= 800
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return (u32)f32_to_bf16(lo) | (u32)f32_to_bf16(hi) << 16;
#endif
}
// bytes 0 and 1 (or 2 and 3) of four as f16, each minus 128: exact
DEVICE u32 bytes_to_f16x2(u32 four, bool upper) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(four), "r"(0x64646464u), "r"(upper ? 0x4342u : 0x4140u));  // 1024 + byte
  asm("sub.f16x2 %0, %0, %1;" : "+r"(r) : "r"(0x64806480u));
  return r;
}
// byte j of four minus 128, exact: 2^23 + byte is a float whose lowest bits are the byte
DEVICE float byte_to_f32(u32 four, int j) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(four), "r"(0x4b000000u), "r"(0x7540u | j));
  return __int_as_float(r) - 8388736.f;
}
DEVICE u32 mul_f16x2(u32 a, u32 b) {
  u32 r;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// byte i of the result is that of the eight bytes of b:a which nibble i of `which`, 0..7, names
DEVICE u32 byte_perm(u32 a, u32 b, u32 which) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which));
  return r;
}
DEVICE float ex2(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
#endif  // CPU_SHIM

#define NEG_INF __int_as_float(0xff800000)
