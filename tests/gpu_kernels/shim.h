// Runs a CUDA kernel's own source on the CPU: one fiber per CUDA thread, blocks one after another.
//
// Every fiber runs until its next barrier, in an order chosen by `order`: 0 forward, 1 backward, above 1 shuffled, below
// 0 one warp runs as far as its next __syncthreads() before another starts, warps shuffled. So a missing barrier shows as
// a wrong result. Shared memory starts as NaN and is guarded at its end. cp.async copies happen as late as the waits
// allow. ldmatrix and mma have their exact lane layouts. shim_wgmma.h has Hopper's instructions. Not seen here: weak memory
// ordering, timing.
#pragma once
#define CPU_SHIM
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
using std::max;
using std::min;
#define AFTER_PREVIOUS
#define KERNEL(threads, blocks_per_sm, name) static void name
#define DEVICE static inline
#define __shared__ static thread_local
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
inline int4 make_int4(int a, int b, int c, int d) { return {a, b, c, d}; }
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
inline float __int_as_float(unsigned i) { float f; memcpy(&f, &i, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned i; memcpy(&i, &f, 4); return i; }
struct F16 { enum { is_bf16 = 0 }; };
struct BF16 { enum { is_bf16 = 1 }; };

namespace shim {
enum State { RUNNING, AT_BARRIER, IN_WARP, AT_PHASE, DONE };
struct Copy { void* to; const void* from; bool ok; };
struct Barrier { int count, pending; long phase; };  // in shared memory: shim_wgmma.h
struct Store { void* to; const void* from; int nbytes; };
struct Product { const void *a; float rows[2][16]; u64 of_a, of_b, seen; int n; bool is_bf16, add; float* c; };
struct Warp { u64 slot[2][32][3]; int waiting = 0, alive = 32, parity = 0; long generation = 0; };
struct Fiber {
  ucontext_t context; jmp_buf here; bool started; State state; uint3 id; int number, line; Warp* warp; long generation;
  const char* where; std::vector<std::vector<Copy>> groups; std::vector<Copy> open; std::vector<char> stack;
  Barrier* barrier; long phase; std::vector<std::pair<Barrier*, std::vector<Copy>>> awaited;
  std::vector<std::vector<Product>> products; std::vector<Product> issued; std::vector<Store> stores;
};
struct Block {
  std::vector<Fiber> fibers; std::vector<Warp> warps; jmp_buf scheduler; std::function<void()> body; Fiber* now = nullptr;
  uint3 id, grid, threads; std::vector<uint4> shared; std::map<uintptr_t, Barrier> barriers; int order;
  char* memory() { return (char*)(((uintptr_t)shared.data() + 1023) & ~(uintptr_t)1023); }
};
inline thread_local Block* B;
[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }
inline thread_local std::string fault;  // of a kernel: an exception cannot leave a fiber
inline void yield() { if (_setjmp(B->now->here) == 0) _longjmp(B->scheduler, 1); }
inline void stop(const std::string& what) { if (fault.empty()) fault = what; B->now->state = DONE; _longjmp(B->scheduler, 1); }
inline void entry() { B->body(); B->now->state = DONE; _longjmp(B->scheduler, 1); }
inline void do_copies(std::vector<Copy>& group) {
  for (auto& c : group) { if (c.ok) memcpy(c.to, c.from, 16); else memset(c.to, 0, 16); }
  group.clear();
}
inline void count_down(Barrier& b) { if (--b.pending == 0) { b.pending = b.count; b.phase++; } }
// the oldest copies that an in-memory barrier counts; false if there are none
inline bool land(Fiber& f) {
  if (f.awaited.empty()) return false;
  do_copies(f.awaited[0].second);
  count_down(*f.awaited[0].first);
  f.awaited.erase(f.awaited.begin());
  return true;
}
// all threads of a warp leave a value, then each reads those of any
inline u64 (*exchange(const u64* v, int n, const char* where))[3] {
  Fiber* f = B->now; Warp* w = f->warp; int parity = w->parity;
  memcpy(w->slot[parity][f->number & 31], v, n * 8);
  f->where = where;
  if (++w->waiting == w->alive) { w->waiting = 0; w->parity ^= 1; w->generation++; }
  else { long g = w->generation; f->state = IN_WARP; f->generation = g; while (w->generation == g) yield(); }
  f->state = RUNNING;
  return w->slot[parity];
}
inline void barrier(int line) { B->now->state = AT_BARRIER; B->now->where = "__syncthreads"; B->now->line = line; yield(); }

inline void step(Block& b, Fiber& f, int& ran) {
  if (f.state == IN_WARP && f.warp->generation != f.generation) f.state = RUNNING;
  if (f.state == AT_PHASE && f.barrier->phase != f.phase) f.state = RUNNING;
  if (f.state != RUNNING) return;
  ran++;
  b.now = &f;
  if (_setjmp(b.scheduler) == 0) {
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(); f.context.uc_stack.ss_size = f.stack.size(); f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
    setcontext(&f.context);
  }
  if (b.now->state == DONE) {
    Warp* w = b.now->warp;
    if (--w->alive && w->waiting == w->alive) { w->waiting = 0; w->parity ^= 1; w->generation++; }
  }
}

inline void run_block(Block& b, int order, std::mt19937& random) {
  const int n = (int)b.fibers.size();
  std::vector<int> threads(n), warps(n / 32);
  for (int i = 0; i < n; i++) threads[i] = order == 1 ? n - 1 - i : i;
  for (int i = 0; i < n / 32; i++) warps[i] = i;
  for (;;) {
    int ran = 0, waiting = 0, done = 0;
    if (order >= 0) {
      if (order > 1) std::shuffle(threads.begin(), threads.end(), random);
      for (volatile int i = 0; i < n; i++) step(b, b.fibers[threads[i]], ran);
    } else {
      std::shuffle(warps.begin(), warps.end(), random);
      for (volatile int i = 0; i < n / 32; i++)
        for (volatile int before = -1; before != ran;) {
          before = ran;
          for (volatile int l = 0; l < 32; l++) step(b, b.fibers[warps[i] * 32 + l], ran);
        }
    }
    if (!fault.empty()) fail(fault);
    for (auto& f : b.fibers) {
      waiting += f.state == AT_BARRIER;
      done += f.state == DONE;
      ran += f.state == IN_WARP && f.warp->generation != f.generation;
    }
    if (done == n) return;
    if (ran) continue;
    for (auto& f : b.fibers) ran += land(f);  // later than this nothing can be
    if (ran) continue;
    if (waiting + done < n) {
      std::string s = "deadlock:";
      for (auto& f : b.fibers) if (f.state != DONE && f.number % 32 == 0) s += " thread " + std::to_string(f.number) + " at " + f.where;
      fail(s);
    }
    if (done) fail("__syncthreads after some threads returned");
    for (auto& f : b.fibers) {
      if (f.line != b.fibers[0].line) fail("threads wait at different __syncthreads, lines " + std::to_string(f.line) + " and " + std::to_string(b.fibers[0].line));
      f.state = RUNNING;
    }
  }
}

inline void launch(uint3 grid, int n, size_t shared, int order, std::function<void()> body) {
  Block b;
  B = &b; b.grid = grid; b.threads = {(unsigned)n, 1, 1}; b.body = body; b.order = order;
  fault.clear();
  if (n % 32) fail("threads of a block must be a multiple of 32");
  b.fibers.resize(n);
  b.warps.resize(n / 32);
  for (auto& f : b.fibers) f.stack.resize(64 << 10);
  b.shared.resize(shared / 16 + 80);
  std::mt19937 random(order);
  for (unsigned y = 0; y < grid.y; y++) for (unsigned x = 0; x < grid.x; x++) {
    b.id = {x, y, 0};
    memset((void*)b.shared.data(), 0xff, b.shared.size() * 16);  // NaN in f32, f16 and bf16
    for (auto& w : b.warps) w = Warp();
    b.barriers.clear();
    for (int i = 0; i < n; i++) {
      Fiber& f = b.fibers[i];
      f.started = false; f.state = RUNNING; f.number = i; f.line = 0; f.warp = &b.warps[i / 32]; f.id = {(unsigned)i, 0, 0};
      f.where = ""; f.groups.clear(); f.open.clear(); f.awaited.clear(); f.products.clear(); f.issued.clear(); f.stores.clear();
    }
    run_block(b, order, random);
    for (int i = 0; i < 64; i++) if ((u8)b.memory()[shared + i] != 0xff) fail("write past the end of shared memory");
    for (auto& f : b.fibers) {
      bool left = !f.open.empty() || !f.awaited.empty() || !f.stores.empty();
      for (auto& g : f.groups) left |= !g.empty();
      if (!f.issued.empty()) fail("kernel ended with products under way");
      for (auto& g : f.products) if (!g.empty()) fail("kernel ended with products under way");
      if (left) fail("kernel ended with copies under way");
    }
  }
  B = nullptr;
}

template <class... A, size_t... I> void call(void (*f)(A...), void** args, std::index_sequence<I...>) {
  f(*(std::remove_cv_t<A>*)args[I]...);
}
template <class... A> void call(void (*f)(A...), void** args) { call(f, args, std::index_sequence_for<A...>()); }
template <class... A> int arity(void (*)(A...)) { return sizeof...(A); }

inline float f16_value(u16 h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
inline u16 f16_bits(float f) { _Float16 x = (_Float16)f; u16 h; memcpy(&h, &x, 2); return h; }
inline u16 bf16_bits(float f) { u32 u = __float_as_uint(f); return f != f ? 0x7fff : (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
template <class T> float value(u16 h) { return T::is_bf16 ? __int_as_float((u32)h << 16) : f16_value(h); }
}  // namespace shim

#define threadIdx (shim::B->now->id)
#define blockIdx (shim::B->id)
#define blockDim (shim::B->threads)
#define gridDim (shim::B->grid)
#define DYN_SMEM(name) uint4* name = (uint4*)shim::B->memory()
#define __syncthreads() shim::barrier(__LINE__)
inline void __syncwarp(unsigned = ~0u) { u64 v = 0; shim::exchange(&v, 1, "__syncwarp"); }
template <class V> V shim_from(V v, int lane, const char* where) {
  u64 x = 0; memcpy(&x, &v, sizeof v); auto s = shim::exchange(&x, 1, where); V r; memcpy(&r, s[lane & 31], sizeof r); return r;
}
template <class V> V __shfl_xor_sync(unsigned, V v, int m) { return shim_from(v, (shim::B->now->number & 31) ^ m, "shfl_xor"); }
template <class V> V __shfl_sync(unsigned, V v, int l) { return shim_from(v, l, "shfl"); }
inline int __any_sync(unsigned, int p) { u64 x = p != 0; auto s = shim::exchange(&x, 1, "any"); int r = 0; for (int i = 0; i < 32; i++) r |= (int)s[i][0]; return r; }
inline unsigned __ballot_sync(unsigned, int p) { u64 x = p != 0; auto s = shim::exchange(&x, 1, "ballot"); unsigned r = 0; for (int i = 0; i < 32; i++) r |= (unsigned)s[i][0] << i; return r; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <class V> V __ldg(const V* p) { return *p; }
inline int __dp4a(int a, int b, int c) { for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i)); return c; }

typedef uintptr_t saddr;
inline saddr smem_addr(const void* p) { return (saddr)p; }
inline void cp_async16(saddr to, const void* from, bool ok) {
  if (to & 15 || (ok && ((uintptr_t)from & 15))) shim::stop("cp.async operand is not aligned to 16 bytes");
  shim::B->now->open.push_back({(void*)to, from, ok});
}
inline void cp_async_commit() { auto* f = shim::B->now; f->groups.push_back(std::move(f->open)); f->open.clear(); }
template <int N> void cp_async_wait() { auto* f = shim::B->now; for (size_t i = 0; i + N < f->groups.size(); i++) shim::do_copies(f->groups[i]); }
inline void shim_ldsm(u32 (&r)[4], saddr p, bool trans) {
  if (p & 15) shim::stop("ldmatrix row is not aligned to 16 bytes");
  u64 v = p; auto s = shim::exchange(&v, 1, "ldmatrix");
  int lane = shim::B->now->number & 31, g = lane >> 2, t = lane & 3;
  for (int j = 0; j < 4; j++) {
    auto at = [&](int row, int col) { return ((const u16*)(uintptr_t)s[j * 8 + row][0])[col]; };
    u16 a = trans ? at(2 * t, g) : at(g, 2 * t), b = trans ? at(2 * t + 1, g) : at(g, 2 * t + 1);
    r[j] = a | (u32)b << 16;
  }
}
inline void ldsm_x4(u32 (&r)[4], saddr p) { shim_ldsm(r, p, false); }
inline void ldsm_x4_t(u32 (&r)[4], saddr p) { shim_ldsm(r, p, true); }
template <class T> void mma16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u64 v[3] = {a[0] | (u64)a[1] << 32, a[2] | (u64)a[3] << 32, b0 | (u64)b1 << 32};
  auto s = shim::exchange(v, 3, "mma");
  int lane = shim::B->now->number & 31, g = lane >> 2, t = lane & 3;
  for (int e = 0; e < 4; e++) {
    int n = 2 * t + (e & 1), low = e >> 1;  // row g or g + 8, column n
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      int kk = k & 7, r = (k >> 3) * 2 + low;  // register of a
      u16 x = s[g * 4 + (kk >> 1)][r >> 1] >> ((r & 1) * 32 + (kk & 1) * 16);
      u16 y = s[n * 4 + (kk >> 1)][2] >> ((k >> 3) * 32 + (kk & 1) * 16);
      sum += shim::value<T>(x) * shim::value<T>(y);
    }
    c[e] += sum;
  }
}
inline float f16_to_f32(u16 h) { return shim::f16_value(h); }
inline u16 f32_to_f16(float f) { return shim::f16_bits(f); }
inline float bf16_to_f32(u16 h) { return __int_as_float((u32)h << 16); }
inline u16 f32_to_bf16(float f) { return shim::bf16_bits(f); }
template <class T> u32 pack2(float lo, float hi) {
  return T::is_bf16 ? shim::bf16_bits(lo) | (u32)shim::bf16_bits(hi) << 16 : shim::f16_bits(lo) | (u32)shim::f16_bits(hi) << 16;
}
inline u32 bytes_to_f16x2(u32 four, bool upper) {
  u32 two = upper ? four >> 16 : four;
  return pack2<F16>((float)(int)(two & 255) - 128.f, (float)(int)(two >> 8 & 255) - 128.f);
}
inline float byte_to_f32(u32 four, int j) { return (float)(int)(four >> 8 * j & 255) - 128.f; }
inline u32 mul_f16x2(u32 a, u32 b) {
  return pack2<F16>(f16_to_f32(a) * f16_to_f32(b), f16_to_f32(a >> 16) * f16_to_f32(b >> 16));
}
inline u32 byte_perm(u32 a, u32 b, u32 which) {
  u32 r = 0; u64 bytes = a | (u64)b << 32;
  for (int i = 0; i < 4; i++) r |= (u32)(bytes >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
inline float ex2(float x) { return exp2f(x); }
#include "shim_wgmma.h"
