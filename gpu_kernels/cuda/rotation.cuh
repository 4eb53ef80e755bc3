// Rotary position embedding of one pair: x0' = x0 cos - x1 sin, x1' = x0 sin + x1 cos.
// cos_sin is [cos | sin] of the pairs; pair j is (2j, 2j + 1), or (j, j + n / 2) for NEOX.
struct Pair { int a, b; };
DEVICE Pair pair_at(int j, int n, int neox) {
  Pair p;
  p.a = neox ? j : 2 * j;
  p.b = neox ? j + n / 2 : 2 * j + 1;
  return p;
}
DEVICE float2 turned(float x0, float x1, const float* cos_sin, int j, int n) {
  const float c = cos_sin[j], s = cos_sin[j + n / 2];
  return make_float2(x0 * c - x1 * s, x0 * s + x1 * c);
}
