// float16 and bfloat16 with the names of cuda_fp16.h and cuda_bf16.h. Sums and products are rounded after each operation.
#pragma once

#if defined(__F16C__)  // g++'s own names: immintrin.h takes longer to read than all else
typedef float EmulatorFloats __attribute__((vector_size(16)));
typedef short EmulatorHalves __attribute__((vector_size(16)));
#endif
inline unsigned short emulator_half_bits(float v) {  // to nearest even
#if defined(__F16C__)
  return (unsigned short)__builtin_ia32_vcvtps2ph(EmulatorFloats{v, 0.0f, 0.0f, 0.0f}, 0)[0];
#else
  unsigned u;
  memcpy(&u, &v, 4);
  const unsigned sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return (unsigned short)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (unsigned short)(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    return (unsigned short)(sign | unsigned(rintf(scaled * 16777216.0f)));
  }
  return (unsigned short)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
#endif
}
inline float emulator_half_value(unsigned short h) {
#if defined(__F16C__)
  return __builtin_ia32_vcvtph2ps(EmulatorHalves{short(h), 0, 0, 0, 0, 0, 0, 0})[0];
#else
  const unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  unsigned u;
  float v;
  if (exponent == 0) {
    v = float(mantissa) / 16777216.0f;
    memcpy(&u, &v, 4);
    u |= sign;
  } else {
    u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  memcpy(&v, &u, 4);
  return v;
#endif
}
inline unsigned short emulator_bfloat_bits(float v) {
  unsigned u;
  memcpy(&u, &v, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float emulator_bfloat_value(unsigned short b) {
  const unsigned u = unsigned(b) << 16;
  float v;
  memcpy(&v, &u, 4);
  return v;
}

struct __half {
  unsigned short bits;
  __half() = default;
  __half(float v) : bits(emulator_half_bits(v)) {}
  __half(double v) : bits(emulator_half_bits(float(v))) {}
  __half(int v) : bits(emulator_half_bits(float(v))) {}
  operator float() const { return emulator_half_value(bits); }
};
struct __align__(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half x, __half y) : x(x), y(y) {}
};
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) : bits(emulator_bfloat_bits(v)) {}
  operator float() const { return emulator_bfloat_value(bits); }
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

inline half __float2half(float v) { return half(v); }
inline half __float2half_rn(float v) { return half(v); }
inline float __half2float(half v) { return float(v); }
inline half __int2half_rn(int v) { return half(float(v)); }
inline half __ushort_as_half(unsigned short v) { half h; h.bits = v; return h; }
inline unsigned short __half_as_ushort(half v) { return v.bits; }
inline half __short_as_half(short v) { return __ushort_as_half((unsigned short)v); }
inline short __half_as_short(half v) { return short(v.bits); }
inline half2 __floats2half2_rn(float a, float b) { return half2(half(a), half(b)); }
inline half2 __float22half2_rn(float2 v) { return half2(half(v.x), half(v.y)); }
inline float2 __half22float2(half2 v) { return make_float2(float(v.x), float(v.y)); }
inline half2 __float2half2_rn(float v) { return half2(half(v), half(v)); }
inline half2 __halves2half2(half a, half b) { return half2(a, b); }
inline half2 make_half2(half a, half b) { return half2(a, b); }
inline half2 __half2half2(half v) { return half2(v, v); }
inline half __low2half(half2 v) { return v.x; }
inline half __high2half(half2 v) { return v.y; }
inline half2 __low2half2(half2 v) { return half2(v.x, v.x); }
inline half2 __high2half2(half2 v) { return half2(v.y, v.y); }
inline float __low2float(half2 v) { return float(v.x); }
inline float __high2float(half2 v) { return float(v.y); }

inline half __hadd(half a, half b) { return half(float(a) + float(b)); }
inline half __hsub(half a, half b) { return half(float(a) - float(b)); }
inline half __hmul(half a, half b) { return half(float(a) * float(b)); }
inline half __hdiv(half a, half b) { return half(float(a) / float(b)); }
inline half __hfma(half a, half b, half c) { return half(double(float(a)) * float(b) + float(c)); }
inline half __hneg(half a) { return __ushort_as_half(a.bits ^ 0x8000); }
inline half __habs(half a) { return __ushort_as_half(a.bits & 0x7fff); }
inline half __hmax(half a, half b) { return half(fmaxf(float(a), float(b))); }
inline half __hmin(half a, half b) { return half(fminf(float(a), float(b))); }
inline half2 __hadd2(half2 a, half2 b) { return half2(__hadd(a.x, b.x), __hadd(a.y, b.y)); }
inline half2 __hsub2(half2 a, half2 b) { return half2(__hsub(a.x, b.x), __hsub(a.y, b.y)); }
inline half2 __hmul2(half2 a, half2 b) { return half2(__hmul(a.x, b.x), __hmul(a.y, b.y)); }
inline half2 __hfma2(half2 a, half2 b, half2 c) { return half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }
inline half2 __hneg2(half2 a) { return half2(__hneg(a.x), __hneg(a.y)); }
inline half2 __habs2(half2 a) { return half2(__habs(a.x), __habs(a.y)); }
inline half2 __hmax2(half2 a, half2 b) { return half2(__hmax(a.x, b.x), __hmax(a.y, b.y)); }
inline half2 __hmin2(half2 a, half2 b) { return half2(__hmin(a.x, b.x), __hmin(a.y, b.y)); }
inline bool __hisnan(half a) { return (a.bits & 0x7fff) > 0x7c00; }
inline bool __hisinf(half a) { return (a.bits & 0x7fff) == 0x7c00; }

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { __nv_bfloat16 b; b.bits = v; return b; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return __nv_bfloat162(__nv_bfloat16(a), __nv_bfloat16(b)); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return make_float2(float(v.x), float(v.y)); }
inline float __low2float(__nv_bfloat162 v) { return float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return float(v.y); }
