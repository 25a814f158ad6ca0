// Registers and the arithmetic of PTX (ISA 8.8, "Instructions"); results that the ISA leaves open end the launch.
#pragma once
#include <fenv.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "../cuda_emulator/runtime.h"

#define ALWAYS inline __attribute__((always_inline))

static uint32_t site;  // the line of the PTX that ran last

[[noreturn]] static __attribute__((noinline, cold)) void fail(const char* format, ...) {
  static char text[400];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  emulator_fail(text);
  __builtin_unreachable();
}

// ---- registers hold bits; float and double where they are declared so
ALWAYS uint32_t bits(float v) { uint32_t r; memcpy(&r, &v, 4); return r; }
ALWAYS uint64_t bits(double v) { uint64_t r; memcpy(&r, &v, 8); return r; }
ALWAYS float to_float(uint32_t v) { float r; memcpy(&r, &v, 4); return r; }
ALWAYS double to_double(uint64_t v) { double r; memcpy(&r, &v, 8); return r; }
template <class T> ALWAYS T bits(T v) { return v; }
template <class T> struct As {
  template <class R> static ALWAYS T from(R r) { return T(bits(r)); }
};
template <> struct As<float> {
  static ALWAYS float from(float r) { return r; }
  static ALWAYS float from(uint32_t r) { return to_float(r); }
};
template <> struct As<double> {
  static ALWAYS double from(double r) { return r; }
  static ALWAYS double from(uint64_t r) { return to_double(r); }
};
template <class T, class R> ALWAYS T as(R r) { return As<T>::from(r); }
// A signed value in a wider register is sign-extended, an unsigned one zero-extended.
template <class R> struct Put {
  template <class V> static ALWAYS R of(V v) { return R(bits(v)); }
};
template <> struct Put<float> {
  static ALWAYS float of(float v) { return v; }
  static ALWAYS float of(uint32_t v) { return to_float(v); }
  static ALWAYS float of(int32_t v) { return to_float(uint32_t(v)); }
};
template <> struct Put<double> {
  static ALWAYS double of(double v) { return v; }
  static ALWAYS double of(uint64_t v) { return to_double(v); }
  static ALWAYS double of(int64_t v) { return to_double(uint64_t(v)); }
};
template <class R, class V> ALWAYS void put(R& r, V v) { r = Put<R>::of(v); }

template <class T> struct Wide;
template <> struct Wide<int16_t> { typedef int32_t type; };
template <> struct Wide<uint16_t> { typedef uint32_t type; };
template <> struct Wide<int32_t> { typedef int64_t type; };
template <> struct Wide<uint32_t> { typedef uint64_t type; };
template <> struct Wide<int64_t> { typedef __int128 type; };
template <> struct Wide<uint64_t> { typedef unsigned __int128 type; };
template <class T> struct Unsigned { typedef T type; };
template <> struct Unsigned<int8_t> { typedef uint8_t type; };
template <> struct Unsigned<int16_t> { typedef uint16_t type; };
template <> struct Unsigned<int32_t> { typedef uint32_t type; };
template <> struct Unsigned<int64_t> { typedef uint64_t type; };

// ---- integers: sums and products wrap
template <class T> ALWAYS T add(T a, T b) { typedef typename Unsigned<T>::type U; return T(U(U(a) + U(b))); }
template <class T> ALWAYS T sub(T a, T b) { typedef typename Unsigned<T>::type U; return T(U(U(a) - U(b))); }
template <class T> ALWAYS T mul_lo(T a, T b) { typedef typename Wide<typename Unsigned<T>::type>::type W; return T(W(typename Unsigned<T>::type(a)) * W(typename Unsigned<T>::type(b))); }
template <class T> ALWAYS typename Wide<T>::type mul_wide(T a, T b) { return typename Wide<T>::type(a) * b; }
template <class T> ALWAYS T mul_hi(T a, T b) { return T(mul_wide(a, b) >> (8 * sizeof(T))); }
template <class T> T quotient(T a, T b) {
  if (b == 0) fail("an integer division by zero");
  return b == T(-1) ? sub(T(0), a) : T(a / b);
}
template <> uint16_t quotient(uint16_t a, uint16_t b) { if (!b) fail("an integer division by zero"); return a / b; }
template <> uint32_t quotient(uint32_t a, uint32_t b) { if (!b) fail("an integer division by zero"); return a / b; }
template <> uint64_t quotient(uint64_t a, uint64_t b) { if (!b) fail("an integer division by zero"); return a / b; }
template <class T> T remainder_of(T a, T b) { return sub(a, mul_lo(quotient(a, b), b)); }
template <class T> ALWAYS T lesser(T a, T b) { return a < b ? a : b; }
template <class T> ALWAYS T larger(T a, T b) { return a > b ? a : b; }
template <class T> ALWAYS T absolute(T a) { return a < 0 ? sub(T(0), a) : a; }
// shift amounts past the width are the width
template <class T> ALWAYS T shl(T a, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : T(a << n); }
template <class T> ALWAYS T shr(T a, uint32_t n) { return T(a >> (n >= 8 * sizeof(T) ? (T(-1) < T(0) ? 8 * sizeof(T) - 1 : 0) : n)) * T(n < 8 * sizeof(T) || T(-1) < T(0)); }
ALWAYS uint32_t shf_l(uint32_t low, uint32_t high, uint32_t n) { return uint32_t((((uint64_t(high) << 32 | low) << n) >> 32)); }
ALWAYS uint32_t shf_r(uint32_t low, uint32_t high, uint32_t n) { return uint32_t((uint64_t(high) << 32 | low) >> n); }
ALWAYS uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (uint32_t i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
ALWAYS uint32_t prmt(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t all = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = selectors >> 4 * i & 15;
    uint32_t byte = uint32_t(all >> 8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << 8 * i;
  }
  return r;
}
template <class T> ALWAYS T bfi(T a, T b, uint32_t position, uint32_t length) {
  const int n = 8 * sizeof(T), p = position & 0xff, l = length & 0xff;
  T r = b;
  for (int i = 0; i < l && p + i < n; i++) r = (r & ~(T(1) << (p + i))) | ((a >> i & 1) << (p + i));
  return r;
}
template <class T> ALWAYS T bfe(T a, uint32_t position, uint32_t length) {
  typedef typename Unsigned<T>::type U;
  const int msb = 8 * sizeof(T) - 1, p = position & 0xff, l = length & 0xff;
  const U sign = T(-1) > T(0) || l == 0 ? 0 : U(a) >> (p + l - 1 < msb ? p + l - 1 : msb) & 1;
  U r = 0;
  for (int i = 0; i <= msb; i++) r |= (i < l && p + i <= msb ? U(a) >> (p + i) & 1 : sign) << i;
  return T(r);
}
template <class T> ALWAYS T reversed(T a) { T r = 0; for (unsigned i = 0; i < 8 * sizeof(T); i++) r |= (a >> i & 1) << (8 * sizeof(T) - 1 - i); return r; }
ALWAYS uint32_t clz(uint32_t a) { return a ? __builtin_clz(a) : 32; }
ALWAYS uint32_t clz(uint64_t a) { return a ? __builtin_clzll(a) : 64; }
template <class T> ALWAYS uint32_t bfind(T a, bool shift) {
  typedef typename Unsigned<T>::type U;
  const U v = a < 0 ? U(~a) : U(a);
  if (!v) return 0xffffffffu;
  return shift ? clz(v) : 8 * sizeof(T) - 1 - clz(v);
}
template <class A, class B> ALWAYS uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; i++) c += uint32_t(int32_t(A(a >> 8 * i)) * int32_t(B(b >> 8 * i)));
  return c;
}

// ---- float32 and float64: results that are no number are the canonical NaN (float32)
ALWAYS float canonical(float v) { return v != v ? to_float(0x7fffffffu) : v; }
ALWAYS double canonical(double v) { return v; }
ALWAYS float flushed(float v) { return (bits(v) & 0x7f800000u) ? v : to_float(bits(v) & 0x80000000u); }
ALWAYS float add(float a, float b) { return canonical(a + b); }
ALWAYS float sub(float a, float b) { return canonical(a - b); }
ALWAYS float product(float a, float b) { return canonical(a * b); }
ALWAYS double add(double a, double b) { return a + b; }
ALWAYS double sub(double a, double b) { return a - b; }
ALWAYS double product(double a, double b) { return a * b; }
ALWAYS float fused(float a, float b, float c) { return canonical(__builtin_fmaf(a, b, c)); }
ALWAYS double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class T> __attribute__((noinline)) T fused_in(int mode, T a, T b, T c) {
  volatile T x = a, y = b, z = c;
  const int before = fegetround();
  fesetround(mode);
  volatile T r = fused(T(x), T(y), T(z));
  fesetround(before);
  return r;
}
ALWAYS float divided(float a, float b) { return canonical(a / b); }
ALWAYS double divided(double a, double b) { return a / b; }
ALWAYS float root(float a) { return canonical(sqrtf(a)); }
ALWAYS double root(double a) { return sqrt(a); }
// one NaN gives the other operand; -0 is less than +0
template <class T> ALWAYS T least(T a, T b) {
  if (a != a) return b != b ? canonical(a) : b;
  if (b != b) return a;
  return a == b ? (signbit(a) ? a : b) : a < b ? a : b;
}
template <class T> ALWAYS T most(T a, T b) {
  if (a != a) return b != b ? canonical(a) : b;
  if (b != b) return a;
  return a == b ? (signbit(a) ? b : a) : a > b ? a : b;
}
template <class T> ALWAYS T saturated(T a) { return a != a || a < 0 ? T(0) : a > 1 ? T(1) : a == 0 ? T(0) : a; }
ALWAYS float negated(float a) { return to_float(bits(a) ^ 0x80000000u); }
ALWAYS double negated(double a) { return to_double(bits(a) ^ 0x8000000000000000ull); }
ALWAYS float absolute(float a) { return to_float(bits(a) & 0x7fffffffu); }
ALWAYS double absolute(double a) { return to_double(bits(a) & 0x7fffffffffffffffull); }
ALWAYS float copysign_of(float sign, float a) { return to_float((bits(a) & 0x7fffffffu) | (bits(sign) & 0x80000000u)); }
ALWAYS double copysign_of(double sign, double a) { return copysign(a, sign); }
ALWAYS double rcp_gross(double a) {  // rcp.approx.ftz.f64: the upper halves of operand and result
  return to_double(bits(1.0 / to_double(bits(a) & 0xffffffff00000000ull)) & 0xffffffff00000000ull);
}

// ---- conversions; `.rni` and so on round to an integer, out of range is clamped, NaN is 0
enum Rounding { kNearest, kZero, kDown, kUp };
template <class F> ALWAYS F rounded(F a, Rounding how) {
  return how == kNearest ? F(rint(a)) : how == kZero ? F(trunc(a)) : how == kDown ? F(floor(a)) : F(ceil(a));
}
template <class To, class F> ALWAYS To to_integer(F a, Rounding how) {
  if (a != a) return sizeof(To) == 8 || sizeof(F) == 8 ? To(uint64_t(1) << (8 * sizeof(To) - 1)) : To(0);
  const F r = rounded(a, how);
  const To low = To(-1) < To(0) ? To(uint64_t(1) << (8 * sizeof(To) - 1)) : To(0), high = To(~low);
  if (r <= F(low)) return low;
  const F past = 2 * F(uint64_t(1) << (8 * sizeof(To) - (To(-1) < To(0) ? 2 : 1)));  // the first that is too large
  return r >= past ? high : To(r);
}
template <class To, class From> ALWAYS To clamped(From a) {
  const __int128 low = To(-1) < To(0) ? -(__int128(1) << (8 * sizeof(To) - 1)) : 0;
  const __int128 high = (__int128(1) << (8 * sizeof(To) - (To(-1) < To(0)))) - 1;
  return __int128(a) < low ? To(low) : __int128(a) > high ? To(high) : To(a);
}
template <class To, class From> __attribute__((noinline)) To converted_in(int mode, From a) {
  volatile From x = a;
  const int before = fegetround();
  fesetround(mode);
  volatile To r = To(x);
  fesetround(before);
  return r;
}
