// Hopper's own instructions (sm_90a), one function each: products of a warpgroup of four warps out of shared memory, the
// barriers in shared memory that go with them, and the exchange of registers between warps.
//
// Source: PTX ISA, "asynchronous warpgroup level matrix instructions" (wgmma), "mbarrier", "setmaxnreg".
#include "prims.cuh"
#ifndef CPU_SHIM

// Writes to shared memory so far, and those that a barrier has made known, are there for wgmma.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier counts `count` arrivals, then its phase is over; phases are 0, 1, 0, 1 …
DEVICE void barrier_init(saddr b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(count) : "memory");
}
DEVICE void barrier_arrive(saddr b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(b) : "memory");
}
// arrives when all cp.async that this thread has issued have landed
DEVICE void barrier_arrive_copied(saddr b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(b) : "memory");
}
DEVICE void barrier_wait(saddr b, int phase) {  // until that phase is over
  u32 done;
  do
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(b), "r"(phase) : "memory");
  while (!done);
}

template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// How the L2 cache is to treat what is read: as the first to be thrown out.
DEVICE u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// as cp_async16 of prims.cuh
DEVICE void cp_async16(saddr dst, const void* src, bool ok, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
               ::"r"(dst), "l"(src), "r"(ok ? 16 : 0), "l"(policy) : "memory");
}
// 16 bytes of memory that nobody writes meanwhile
DEVICE uint4 load_16(const void* p, u64 policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
  return v;
}

// Bytes, in 16s, from shared to global memory; bulk_wait() is until all of this thread's are there.
DEVICE void bulk_store(void* dst, saddr src, int nbytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(nbytes) : "memory");
}
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;" ::: "memory");
}

// A matrix in shared memory, in atoms of 8 rows of 128 bytes, whose 16-byte chunk c of row r is at c ^ r; from a multiple
// of 1024 on. leading, stride: bytes from one atom to the next; which way is said at the products.
DEVICE u64 matrix(saddr p, u32 leading, u32 stride) {
  return (u64)((p & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

// The same; but what is computed from it is not kept in registers from before a loop.
DEVICE u64 afresh(u64 v) {
  asm volatile("" : "+l"(v));
  return v;
}

// Before the first product, and after its accumulators or registers of a were written.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define R8(c, i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define R32(c, i) R8(c, i), R8(c, i + 8), R8(c, i + 16), R8(c, i + 24)
#define R128(c) R32(c, 0), R32(c, 32), R32(c, 64), R32(c, 96)
#define D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Until at most N groups are under way; c are accumulators of those that are done.
template <int N> DEVICE void products_wait(float (&c)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : R32(c, 0) : "n"(N) : "memory");
}
template <int N> DEVICE void products_wait(float (&c)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;" : R128(c) : "n"(N) : "memory");
}

// c (64 x 64) = or += a (64 x 16) times b (64 x 16) transposed; rows of both are in atoms, `stride` apart every 8 rows
template <class T> DEVICE void product_64(float (&c)[32], u64 a, u64 b, bool add) {
#define PRODUCT(type)                                                                                                  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type " {" D32       \
               "}, %32, %33, p, 1, 1, 0, 0; }" : R32(c, 0) : "l"(a), "l"(b), "r"((int)add))
  if (T::is_bf16) PRODUCT("bf16.bf16"); else PRODUCT("f16.f16");
#undef PRODUCT
}

// c (64 x 256) += a (64 x 16) times b (16 x 256). Of b, 64 columns are a row of an atom: `leading` to the next 64 columns,
// `stride` to the next 8 rows. a from registers, as mma16816 has it in each warp, or from shared memory, as above.
template <class T> DEVICE void product_256(float (&c)[128], const u32* a, u64 b) {
#define PRODUCT(type)                                                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type " {" D128 "}, {%128, %129, %130, %131}, %132, 1, 1, " \
               "1, 1;" : R128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if (T::is_bf16) PRODUCT("bf16.bf16"); else PRODUCT("f16.f16");
#undef PRODUCT
}
template <class T> DEVICE void product_256(float (&c)[128], u64 a, u64 b) {
#define PRODUCT(type)                                                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type " {" D128 "}, %128, %129, 1, 1, 1, 0, 1;"           \
               : R128(c) : "l"(a), "l"(b))
  if (T::is_bf16) PRODUCT("bf16.bf16"); else PRODUCT("f16.f16");
#undef PRODUCT
}
#endif  // CPU_SHIM
