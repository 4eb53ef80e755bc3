// Blocks of quantised weights as quants.py lays them out on the device: planes, each of one field of all blocks.
//
//   TYPE_ID         block   planes, bytes a block                     a step
//   6   Q5_0           32   qs 16 | qh 4 | d 2                        the block
//   8   Q8_0           32   qs 32 | d 2                               the block
//   12  Q4_K          256   as in the file: d dmin scales 16, qs 128  64 values: low and high nibbles of 32 bytes
//   14  Q6_K          256   ql 128 | qh 64 | scales 16 | d 2          64 values, likewise
//
// A step is what a thread decodes at once: groups of 32 codes, of which value i is s[i / 16] * code[i] - m[i / 16].
#if TYPE_ID == 12 || TYPE_ID == 14
constexpr int BLOCK = 256, STEPS = 4, GROUPS = 2;
#else
constexpr int BLOCK = 32, STEPS = 1, GROUPS = 1;
#endif
constexpr bool HAS_MINIMUM = TYPE_ID == 12;
struct Planes { const u8 *a, *b, *c, *d; };
struct Codes {
  int v[GROUPS][8];    // four int8 each
  float s[GROUPS][2];  // scales of 16
  float m[GROUPS][2];  // minima of 16
};

// where group g of a step begins in its block, in groups of 32
DEVICE int group_at(int step, int g) {
  if (TYPE_ID == 12) return 2 * step + g;
  if (TYPE_ID == 14) return step / 2 * 4 + step % 2 + 2 * g;
  return 0;
}
// bytes 0..127 minus n
DEVICE int bytes_minus(u32 x, u32 n) { return (int)(((x | 0x80808080u) - n * 0x01010101u) ^ 0x80808080u); }
DEVICE void load_32(u32 (&q)[8], const u8* p) {
  const uint4 x = __ldg((const uint4*)p), y = __ldg((const uint4*)p + 1);
  q[0] = x.x; q[1] = x.y; q[2] = x.z; q[3] = x.w;
  q[4] = y.x; q[5] = y.y; q[6] = y.z; q[7] = y.w;
}

DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int step) {
#if TYPE_ID == 8
  u32 q[8];
  load_32(q, w.a + block * 32);
  for (int i = 0; i < 8; i++) c.v[0][i] = (int)q[i];
  c.s[0][0] = c.s[0][1] = f16_to_f32(__ldg((const u16*)w.b + block));
  c.m[0][0] = c.m[0][1] = 0.f;
#elif TYPE_ID == 6
  const uint4 x = __ldg((const uint4*)w.a + block);
  const u32 q[4] = {x.x, x.y, x.z, x.w}, qh = __ldg((const u32*)w.b + block);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 low = q[i & 3] >> (i & 4) & 0x0f0f0f0fu, high = (qh >> 4 * i & 15) * 0x00204081u & 0x01010101u;
    c.v[0][i] = bytes_minus(low | high << 4, 16);
  }
  c.s[0][0] = c.s[0][1] = f16_to_f32(__ldg((const u16*)w.c + block));
  c.m[0][0] = c.m[0][1] = 0.f;
#elif TYPE_ID == 12
  const u8* p = w.a + block * 144;
  const uint4 head = __ldg((const uint4*)p);  // d and dmin, then the 12 bytes
  u32 q[8];
  load_32(q, p + 16 + 32 * step);
  const float d = f16_to_f32((u16)head.x), d_min = f16_to_f32((u16)(head.x >> 16));
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const int i = 2 * step + g, at = 8 * (i & 3);
    const u32 a = head.y >> at & 255, b = head.z >> at & 255, e = head.w >> at & 255;
    const u32 scale = i < 4 ? a & 63 : (e & 15) | a >> 6 << 4, minimum = i < 4 ? b & 63 : e >> 4 | b >> 6 << 4;
    for (int j = 0; j < 8; j++) c.v[g][j] = (int)(q[j] >> 4 * g & 0x0f0f0f0fu);
    c.s[g][0] = c.s[g][1] = __fmul_rn(d, (float)scale);
    c.m[g][0] = c.m[g][1] = __fmul_rn(d_min, (float)minimum);
  }
#elif TYPE_ID == 14
  const int half = step / 2, k = step % 2;
  u32 l[8], h[8];
  load_32(l, w.a + block * 128 + 64 * half + 32 * k);
  load_32(h, w.b + block * 64 + 32 * half);
  const float d = f16_to_f32(__ldg((const u16*)w.d + block));
#pragma unroll
  for (int g = 0; g < 2; g++) {
    for (int j = 0; j < 8; j++) {
      const u32 high = h[j] >> 2 * (k + 2 * g) & 0x03030303u;
      c.v[g][j] = bytes_minus((l[j] >> 4 * g & 0x0f0f0f0fu) | high << 4, 32);
    }
    const u16 two = __ldg((const u16*)(w.c + block * 16) + group_at(step, g));
    c.s[g][0] = __fmul_rn(d, (float)(signed char)(two & 255));
    c.s[g][1] = __fmul_rn(d, (float)(signed char)(two >> 8));
    c.m[g][0] = c.m[g][1] = 0.f;
  }
#endif
}
