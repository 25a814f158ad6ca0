// float16 and bfloat16: exact values as double, one rounding to nearest even at the end.
#pragma once
#include "ptx_values.h"

// Round to a format of `kMantissa` stored bits and exponents down to `kLeast` (of the smallest normal number).
template <int kMantissa, int kLeast, int kMost>
static inline uint16_t packed(long double v, bool to_zero = false) {
  const uint16_t infinite = uint16_t(((kMost - kLeast + 2) << kMantissa)), sign = signbit(v) ? 0x8000 : 0;
  if (v != v) return 0x7fff;
  long double a = fabsl(v);
  if (a == 0) return sign;
  if (isinf(a)) return sign | infinite;
  int e;
  frexpl(a, &e);  // a = m * 2^e, 0.5 <= m < 1
  e -= 1;
  const int unit = (e < kLeast ? kLeast : e) - kMantissa;
  const long double scaled = ldexpl(a, -unit);
  long double whole = to_zero ? floorl(scaled) : rintl(scaled);
  uint32_t r = uint32_t(whole);
  if (e >= kLeast) r += uint32_t(e - kLeast) << kMantissa;  // the hidden bit adds one to the exponent field
  if (r >= infinite) r = to_zero ? infinite - 1 : infinite;
  return sign | uint16_t(r);
}
template <int kMantissa, int kBias>
static inline double unpacked(uint16_t h) {
  const int exponent = (h & 0x7fff) >> kMantissa, top = (0x7fff >> kMantissa);
  const int fraction = h & ((1 << kMantissa) - 1);
  double v;
  if (exponent == top) v = fraction ? double(NAN) : double(INFINITY);
  else if (exponent == 0) v = ldexp(double(fraction), 1 - kBias - kMantissa);
  else v = ldexp(double(fraction | 1 << kMantissa), exponent - kBias - kMantissa);
  return h & 0x8000 ? -v : v;
}
#if defined(__F16C__)
typedef float Floats __attribute__((vector_size(16)));  // immintrin.h takes longer to read than all else here
typedef short Shorts __attribute__((vector_size(16)));
static inline float half_value(uint16_t h) { return __builtin_ia32_vcvtph2ps(Shorts{short(h)})[0]; }
static inline uint16_t half_of(float v) { return v != v ? 0x7fff : uint16_t(__builtin_ia32_vcvtps2ph(Floats{v}, 0)[0]); }
#else
static inline float half_value(uint16_t h) { return float(unpacked<10, 15>(h)); }
static inline uint16_t half_of(float v) { return packed<10, -14, 15>(v); }
#endif
static inline uint16_t half_of(long double v) { return packed<10, -14, 15>(v); }
static inline uint16_t half_of(double v) { return packed<10, -14, 15>(v); }
static inline uint16_t half_to_zero(float v) { return packed<10, -14, 15>(v, true); }
static inline float bfloat_value(uint16_t h) { return to_float(uint32_t(h) << 16); }
static inline uint16_t bfloat_of(float v) { return packed<7, -126, 127>(v); }
static inline uint16_t bfloat_of(long double v) { return packed<7, -126, 127>(v); }

struct Half {
  static double value(uint16_t h) { return half_value(h); }
  static uint16_t of(long double v) { return half_of(v); }
};
struct Bfloat {
  static double value(uint16_t h) { return bfloat_value(h); }
  static uint16_t of(long double v) { return bfloat_of(v); }
};
// operations of one element; 22 bits of a product and 11 of a sum lie within the 64 of a long double (bfloat16: but for
// sums whose parts are more than 2^46 apart)
template <class H> inline uint16_t h_add(uint16_t a, uint16_t b) { return H::of((long double)H::value(a) + H::value(b)); }
template <class H> inline uint16_t h_sub(uint16_t a, uint16_t b) { return H::of((long double)H::value(a) - H::value(b)); }
template <class H> inline uint16_t h_mul(uint16_t a, uint16_t b) { return H::of((long double)H::value(a) * H::value(b)); }
template <class H> inline uint16_t h_min(uint16_t a, uint16_t b) { return H::of(least(H::value(a), H::value(b))); }
template <class H> inline uint16_t h_max(uint16_t a, uint16_t b) { return H::of(most(H::value(a), H::value(b))); }
template <class H> inline uint16_t h_neg(uint16_t a) { return a ^ 0x8000; }
template <class H> inline uint16_t h_abs(uint16_t a) { return a & 0x7fff; }
template <class H> inline uint16_t h_fma(uint16_t a, uint16_t b, uint16_t c) {
  return H::of((long double)H::value(a) * H::value(b) + H::value(c));
}
template <class F> inline uint32_t both(F f, uint32_t a) { return f(uint16_t(a)) | uint32_t(f(uint16_t(a >> 16))) << 16; }
template <class F> inline uint32_t both(F f, uint32_t a, uint32_t b) {
  return f(uint16_t(a), uint16_t(b)) | uint32_t(f(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}
template <class F> inline uint32_t both(F f, uint32_t a, uint32_t b, uint32_t c) {
  return f(uint16_t(a), uint16_t(b), uint16_t(c)) | uint32_t(f(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16))) << 16;
}
