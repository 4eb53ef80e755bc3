// f32 to the 16 bits that tensor cores multiply: bf16, or f16 (Turing), where what is too large is the largest.
DEVICE u32 narrow_2(float lo, float hi, int is_f16) {
  auto clamped = [](float v) { return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v; };  // NaN stays
  return is_f16 ? pack2<F16>(clamped(lo), clamped(hi)) : pack2<BF16>(lo, hi);
}
DEVICE uint4 narrow_8(const float4& a, const float4& b, int is_f16) {
  return make_uint4(
      narrow_2(a.x, a.y, is_f16), narrow_2(a.z, a.w, is_f16), narrow_2(b.x, b.y, is_f16), narrow_2(b.z, b.w, is_f16));
}
