// Hopper's instructions for shim.h: products of a warpgroup out of shared memory, and barriers in shared memory.
//
// Products are done when they are waited for, element by element: descriptors, swizzle, transposition and the lanes'
// accumulators are exact. What they read must not change between issue and wait, or the run fails. Copies that a barrier
// counts land at once in odd orders of threads, as late as can be in even ones. Not seen here: missing fences.
#pragma once

inline void fence_async() {}
inline void products_begin() {}
template <int N> void more_registers() {}
template <int N> void fewer_registers() {}
inline u64 afresh(u64 v) { return v; }
inline u64 evict_first() { return 0; }
inline void cp_async16(saddr to, const void* from, bool ok, u64) { cp_async16(to, from, ok); }
inline uint4 load_16(const void* p, u64) {
  if ((uintptr_t)p & 15) shim::stop("load of 16 bytes is not aligned");
  return *(const uint4*)p;
}
inline void bulk_store(void* to, saddr from, int nbytes) {
  if ((uintptr_t)to & 15 || from & 15 || nbytes & 15) shim::stop("a bulk copy is not of whole 16 bytes");
  shim::B->now->stores.push_back({to, (const void*)from, nbytes});
}
inline void bulk_wait() {
  for (auto& s : shim::B->now->stores) memcpy(s.to, s.from, s.nbytes);
  shim::B->now->stores.clear();
}

inline shim::Barrier& shim_barrier(saddr b) {
  auto found = shim::B->barriers.find(b);
  if (found == shim::B->barriers.end()) shim::stop("a barrier is used that was not initialised");
  return found->second;
}
inline void barrier_init(saddr b, int count) { shim::B->barriers[b] = {count, count, 0}; }
inline void barrier_arrive(saddr b) { shim::count_down(shim_barrier(b)); }
inline void barrier_arrive_copied(saddr b) {
  auto* f = shim::B->now;
  f->awaited.push_back({&shim_barrier(b), std::move(f->open)});
  f->open.clear();
  if (shim::B->order & 1) shim::land(*f);
}
inline void barrier_wait(saddr b, int phase) {
  auto* f = shim::B->now;
  shim::Barrier& barrier = shim_barrier(b);
  if ((barrier.phase & 1) != (phase & 1)) return;
  f->state = shim::AT_PHASE; f->barrier = &barrier; f->phase = barrier.phase; f->where = "barrier_wait";
  shim::yield();
}

inline u64 matrix(saddr p, u32 leading, u32 stride) {
  u64 at = p - (uintptr_t)shim::B->memory();
  if (at & 1023 || at >> 18) shim::stop("a matrix does not begin at a multiple of 1024 bytes of shared memory");
  return at >> 4 | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

namespace shim {
// 16 bits of a matrix: row and column of 16 columns, or, transposed, of 16 rows
inline u16 element(u64 matrix, int row, int k, bool transposed) {
  const u32 at = (matrix & 0x3fff) << 4, leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
  const u32 byte = transposed ? at + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                              : at + row / 8 * stride + row % 8 * 128 + k * 2;
  u16 v;
  memcpy(&v, B->memory() + (byte ^ (byte >> 3 & 0x70)), 2);
  return v;
}
inline const float* table(bool is_bf16) {  // the value of every 16 bits
  static const std::vector<float> both = [] {
    std::vector<float> t(2 << 16);
    for (u32 i = 0; i < 1 << 16; i++) { t[i] = f16_value((u16)i); t[i | 1 << 16] = __int_as_float(i << 16); }
    return t;
  }();
  return both.data() + (is_bf16 ? 1 << 16 : 0);
}
// of all that a warp's part of a product reads
inline u64 seen(const Product& p) {
  u64 h = 0;
  if (!p.a) for (int r = 0; r < 16; r++) for (int k = 0; k < 16; k++)
    h = h * 0x9e3779b97f4a7c15ull + element(p.of_a, B->now->number / 32 % 4 * 16 + r, k, false);
  for (int n = 0; n < p.n; n++) for (int k = 0; k < 16; k++)
    h = h * 0x9e3779b97f4a7c15ull + element(p.of_b, n, k, p.n == 256);
  return h;
}
inline void issue(Product p, const u32* a, const char* where) {
  u64 v[2] = {};
  p.a = a;
  if (a) memcpy(v, a, 16);
  auto s = exchange(v, 2, where);
  const int lane = B->now->number & 31;
  const float* value = table(p.is_bf16);
  if (a) for (int h = 0; h < 2; h++) for (int k = 0; k < 16; k++)
    p.rows[h][k] = value[(u16)(s[(lane & 28) + k % 8 / 2][k / 8] >> (h * 32 + k % 2 * 16))];
  if (lane == 0) p.seen = seen(p);
  B->now->issued.push_back(p);
}
inline void multiply(Product& p) {
  const int lane = B->now->number & 31, row = B->now->number / 32 % 4 * 16 + (lane >> 2);
  if (lane == 0 && seen(p) != p.seen) stop("shared memory changed while a product was under way");
  const float* value = table(p.is_bf16);
  if (!p.a) for (int h = 0; h < 2; h++) for (int k = 0; k < 16; k++)
    p.rows[h][k] = value[element(p.of_a, row + 8 * h, k, false)];
  for (int j = 0; j < p.n / 8; j++)
    for (int e = 0; e < 2; e++) {
      float b[16];
      for (int k = 0; k < 16; k++) b[k] = value[element(p.of_b, 8 * j + 2 * (lane & 3) + e, k, p.n == 256)];
      for (int h = 0; h < 2; h++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += p.rows[h][k] * b[k];
        float& c = p.c[4 * j + 2 * h + e];
        c = p.add ? c + sum : sum;
      }
    }
}
}  // namespace shim

inline void products_commit() { auto* f = shim::B->now; f->products.push_back(std::move(f->issued)); f->issued.clear(); }
template <int N, int SIZE> void products_wait(float (&)[SIZE]) {
  auto& groups = shim::B->now->products;
  for (size_t i = 0; i + N < groups.size(); i++) { for (auto& p : groups[i]) shim::multiply(p); groups[i].clear(); }
}
template <class T> void product_64(float (&c)[32], u64 a, u64 b, bool add) {
  shim::issue({nullptr, {}, a, b, 0, 64, (bool)T::is_bf16, add, c}, nullptr, "product_64");
}
template <class T> void product_256(float (&c)[128], const u32* a, u64 b) {
  shim::issue({a, {}, 0, b, 0, 256, (bool)T::is_bf16, true, c}, a, "product_256");
}
template <class T> void product_256(float (&c)[128], u64 a, u64 b) {
  shim::issue({nullptr, {}, a, b, 0, 256, (bool)T::is_bf16, true, c}, nullptr, "product_256");
}
