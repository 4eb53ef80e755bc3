// Blocks of quantised weights as quants.py lays them out on the device: planes, each of one field of all blocks.
//
//   TYPE_ID         block   planes, bytes a block                     a step
//   2   Q4_0           32   qs 16 | d 2                               the block
//   3   Q4_1           32   qs 16 | d m 4                             the block
//   6   Q5_0           32   qs 16 | qh 4 | d 2                        the block
//   7   Q5_1           32   qs 16 | qh 4 | d m 4                      the block
//   8   Q8_0           32   qs 32 | d 2                               the block
//   10  Q2_K          256   qs 64 | scales 16 | d dmin 4              64 values: two of the four pairs of bits of 32 bytes
//   11  Q3_K          256   qs 64 | hmask 32 | scales 12 | d 2        64 values, likewise
//   12  Q4_K          256   as in the file: d dmin scales 16, qs 128  64 values: low and high nibbles of 32 bytes
//   13  Q5_K          256   as in the file: likewise, qh 32 before qs 64 values, likewise
//   14  Q6_K          256   ql 128 | qh 64 | scales 16 | d 2          64 values, likewise
//   20  IQ4_NL         32   qs 16 | d 2                               the block
//   23  IQ4_XS        256   qs 128 | d, upper and lower scales 8      64 values: two times 16 bytes
//
// A step is what a thread decodes at once: groups of 32 codes, of which value i is s[i / 16] * code[i] - m[i / 16].
#if TYPE_ID >= 10 && TYPE_ID <= 14 || TYPE_ID == 23
constexpr int BLOCK = 256, STEPS = 4, GROUPS = 2;
#else
constexpr int BLOCK = 32, STEPS = 1, GROUPS = 1;
#endif
constexpr bool HAS_MINIMUM = TYPE_ID == 3 || TYPE_ID == 7 || TYPE_ID == 10 || TYPE_ID == 12 || TYPE_ID == 13;
struct Planes { const u8 *a, *b, *c, *d; };
struct Codes {
  int v[GROUPS][8];    // four int8 each
  float s[GROUPS][2];  // scales of 16
  float m[GROUPS][2];  // minima of 16
};

// where group g of a step begins in its block, in groups of 32
DEVICE int group_at(int step, int g) { return TYPE_ID == 14 ? step / 2 * 4 + step % 2 + 2 * g : GROUPS * step + g; }
// bytes 0..127 minus n
DEVICE int bytes_minus(u32 x, u32 n) { return (int)(((x | 0x80808080u) - n * 0x01010101u) ^ 0x80808080u); }
// four bits, each the lowest of a byte
DEVICE u32 spread_bits(u32 four) { return (four & 15) * 0x00204081u & 0x01010101u; }
DEVICE void load_16(u32 (&q)[4], const u8* p) {
  const uint4 x = __ldg((const uint4*)p);
  q[0] = x.x; q[1] = x.y; q[2] = x.z; q[3] = x.w;
}
DEVICE void load_32(u32 (&q)[8], const u8* p) {
  const uint4 x = __ldg((const uint4*)p), y = __ldg((const uint4*)p + 1);
  q[0] = x.x; q[1] = x.y; q[2] = x.z; q[3] = x.w;
  q[4] = y.x; q[5] = y.y; q[6] = y.z; q[7] = y.w;
}
DEVICE float f16_at(const u8* p, i64 i) { return f16_to_f32(__ldg((const u16*)p + i)); }
// scale and minimum of a whole group
DEVICE void set_group(Codes& c, int g, float scale, float minimum) {
  c.s[g][0] = c.s[g][1] = scale;
  c.m[g][0] = c.m[g][1] = minimum;
}
// Eight nibbles as the int8 of IQ4's table: of the low nibbles of the four bytes, and of the high ones.
DEVICE void look_up(int& low, int& high, u32 q) {
  auto four = [](u32 n) {  // the table's values of nibbles 0 to 3: of its lower and of its upper half, then the right one
    const u32 lower = byte_perm(0xbfad9881u, 0xf6eaddcfu, n & 0x7777u);  // -127 -104 -83 -65, -49 -35 -22 -10
    const u32 upper = byte_perm(0x26190d01u, 0x71594535u, n & 0x7777u);  // 1 13 25 38, 53 69 89 113
    return byte_perm(lower, upper, 0x3210u | (n & 0x8888u) >> 1);
  };
  const u32 x = four(q), y = four(q >> 16);
  low = (int)byte_perm(x, y, 0x6420u);
  high = (int)byte_perm(x, y, 0x7531u);
}

#if TYPE_ID == 8
DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int) {
  u32 q[8];
  load_32(q, w.a + block * 32);
  for (int i = 0; i < 8; i++) c.v[0][i] = (int)q[i];
  set_group(c, 0, f16_at(w.b, block), 0.f);
}

#elif TYPE_ID == 2 || TYPE_ID == 3 || TYPE_ID == 6 || TYPE_ID == 7
DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int) {
  constexpr bool FIVE_BITS = TYPE_ID >= 6;
  const u8* scales = FIVE_BITS ? w.c : w.b;
  u32 q[4];
  load_16(q, w.a + block * 16);
  const u32 qh = FIVE_BITS ? __ldg((const u32*)w.b + block) : 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 code = (q[i & 3] >> (i & 4) & 0x0f0f0f0fu) | spread_bits(qh >> 4 * i) << 4;
    c.v[0][i] = HAS_MINIMUM ? (int)code : bytes_minus(code, FIVE_BITS ? 16 : 8);
  }
  if (HAS_MINIMUM)
    set_group(c, 0, f16_at(scales, 2 * block), -f16_at(scales, 2 * block + 1));
  else
    set_group(c, 0, f16_at(scales, block), 0.f);
}

#elif TYPE_ID == 20 || TYPE_ID == 23
DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int step) {
  const u8* p = w.a + block * (BLOCK / 2) + 32 * step;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    u32 q[4];
    load_16(q, p + 16 * g);
    for (int i = 0; i < 4; i++) look_up(c.v[g][i], c.v[g][i + 4], q[i]);
    if (TYPE_ID == 23) {
      const uint2 head = __ldg((const uint2*)w.b + block);  // d and the upper bits, then the lower ones
      const int i = 2 * step + g, scale = (int)((head.y >> 4 * i & 15) | (head.x >> 16 >> 2 * i & 3) << 4) - 32;
      set_group(c, g, __fmul_rn(f16_to_f32((u16)head.x), (float)scale), 0.f);
    } else {
      set_group(c, g, f16_at(w.b, block), 0.f);
    }
  }
}

#elif TYPE_ID == 10 || TYPE_ID == 11
DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int step) {
  constexpr bool IS_Q3 = TYPE_ID == 11;
  u32 q[8], mask[8];
  load_32(q, w.a + block * 64 + 32 * (step / 2));
  if (IS_Q3) load_32(mask, w.b + block * 32);
  const float d = IS_Q3 ? f16_at(w.d, block) : f16_at(w.c, 2 * block);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const int group = 2 * step + g;
    for (int j = 0; j < 8; j++) {
      const u32 low = q[j] >> 2 * (group & 3) & 0x03030303u;
      c.v[g][j] = IS_Q3 ? bytes_minus(low | (mask[j] >> group & 0x01010101u) << 2, 4) : (int)low;
    }
    if (IS_Q3) {
      const u32* packed = (const u32*)w.c + block * 3;  // scales 4i.. have their low bits in nibbles of word i & 1
      const u32 low = __ldg(packed + (group >> 1 & 1)) >> (group & 4), high = __ldg(packed + 2) >> 2 * (group >> 1);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int at = 8 * (2 * (group & 1) + h), scale = (int)((low >> at & 15) | (high >> at & 3) << 4) - 32;
        c.s[g][h] = __fmul_rn(d, (float)scale);
        c.m[g][h] = 0.f;
      }
    } else {
      const u32 two = __ldg((const u16*)(w.b + block * 16) + group);
      const float d_min = f16_at(w.c, 2 * block + 1);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        c.s[g][h] = __fmul_rn(d, (float)(two >> 8 * h & 15));
        c.m[g][h] = __fmul_rn(d_min, (float)(two >> (8 * h + 4) & 15));
      }
    }
  }
}

#elif TYPE_ID == 12 || TYPE_ID == 13
DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int step) {
  constexpr bool FIVE_BITS = TYPE_ID == 13;
  const u8* p = w.a + block * (FIVE_BITS ? 176 : 144);
  const uint4 head = __ldg((const uint4*)p);  // d and dmin, then the 12 bytes
  u32 q[8], qh[8];
  load_32(q, p + (FIVE_BITS ? 48 : 16) + 32 * step);
  if (FIVE_BITS) load_32(qh, p + 16);
  const float d = f16_to_f32((u16)head.x), d_min = f16_to_f32((u16)(head.x >> 16));
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const int i = 2 * step + g, at = 8 * (i & 3);
    const u32 a = head.y >> at & 255, b = head.z >> at & 255, e = head.w >> at & 255;
    const u32 scale = i < 4 ? a & 63 : (e & 15) | a >> 6 << 4, minimum = i < 4 ? b & 63 : e >> 4 | b >> 6 << 4;
    for (int j = 0; j < 8; j++) {
      const u32 low = q[j] >> 4 * g & 0x0f0f0f0fu;
      c.v[g][j] = (int)(FIVE_BITS ? low | (qh[j] >> i & 0x01010101u) << 4 : low);
    }
    set_group(c, g, __fmul_rn(d, (float)scale), __fmul_rn(d_min, (float)minimum));
  }
}

#elif TYPE_ID == 14
DEVICE void decode_step(Codes& c, const Planes& w, i64 block, int step) {
  const int half = step / 2, k = step % 2;
  u32 l[8], h[8];
  load_32(l, w.a + block * 128 + 64 * half + 32 * k);
  load_32(h, w.b + block * 64 + 32 * half);
  const float d = f16_at(w.d, block);
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
}
#else  // floats: there is nothing to decode
DEVICE void decode_step(Codes&, const Planes&, i64, int) {}
#endif
