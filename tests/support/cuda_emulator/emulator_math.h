// Integer and float intrinsics.
#pragma once

inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
// As in CUDA, what is called on a float is computed as one.
#define EMULATOR_FLOAT(name) inline float name(float v) { return name##f(v); }
EMULATOR_FLOAT(ceil)
EMULATOR_FLOAT(cos)
EMULATOR_FLOAT(exp)
EMULATOR_FLOAT(fabs)
EMULATOR_FLOAT(floor)
EMULATOR_FLOAT(log)
EMULATOR_FLOAT(rint)
EMULATOR_FLOAT(sin)
EMULATOR_FLOAT(sqrt)
EMULATOR_FLOAT(tanh)

template <class To, class From>
inline To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float v) { return emulator_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return emulator_bits<unsigned>(v); }
inline float __int_as_float(int v) { return emulator_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return emulator_bits<float>(v); }

inline int __float2int_rn(float v) { return int(rintf(v)); }
inline int __float2int_rz(float v) { return int(truncf(v)); }
inline int __float2int_rd(float v) { return int(floorf(v)); }
inline int __float2int_ru(float v) { return int(ceilf(v)); }
inline unsigned __float2uint_rn(float v) { return unsigned(rintf(v)); }
inline float __int2float_rn(int v) { return float(v); }
inline float __uint2float_rn(unsigned v) { return float(v); }

inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __frsqrt_rn(float v) { return 1.0f / sqrtf(v); }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float v) { return expf(v); }
inline float __exp10f(float v) { return powf(10.0f, v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float v) { return sinf(v); }
inline float __cosf(float v) { return cosf(v); }
inline float __tanhf(float v) { return tanhf(v); }
inline void sincospif(float v, float* s, float* c) { *s = float(sin(M_PI * v)); *c = float(cos(M_PI * v)); }
inline float __saturatef(float v) { return fminf(fmaxf(v, 0.0f), 1.0f); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return unsigned((((unsigned long long)hi << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return unsigned(((unsigned long long)hi << 32 | lo) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> 4 * i & 15;
    unsigned byte = unsigned(both >> 8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << 8 * i;
  }
  return r;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += int((signed char)(unsigned(a) >> 8 * i)) * int((signed char)(unsigned(b) >> 8 * i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += (a >> 8 * i & 0xff) * (b >> 8 * i & 0xff);
  return c;
}
// Four bytes at a time.
#define EMULATOR_BYTES(name, T, expression)                                  \
  inline unsigned name(unsigned a, unsigned b) {                             \
    unsigned r = 0;                                                          \
    for (int i = 0; i < 4; i++) {                                            \
      const int x = T(a >> 8 * i), y = T(b >> 8 * i);                        \
      r |= unsigned((unsigned char)(expression)) << 8 * i;                   \
    }                                                                        \
    return r;                                                                \
  }
EMULATOR_BYTES(__vadd4, (signed char), x + y)
EMULATOR_BYTES(__vsub4, (signed char), x - y)
EMULATOR_BYTES(__vaddss4, (signed char), x + y > 127 ? 127 : x + y < -128 ? -128 : x + y)
EMULATOR_BYTES(__vsubss4, (signed char), x - y > 127 ? 127 : x - y < -128 ? -128 : x - y)
EMULATOR_BYTES(__vcmpeq4, (unsigned char), x == y ? 255 : 0)
EMULATOR_BYTES(__vcmpne4, (unsigned char), x != y ? 255 : 0)

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }

template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> inline T atomicSub(T* p, T v) { T old = *p; *p = old - v; return old; }
template <class T> inline T atomicMax(T* p, T v) { T old = *p; *p = old > v ? old : v; return old; }
template <class T> inline T atomicMin(T* p, T v) { T old = *p; *p = old < v ? old : v; return old; }
template <class T> inline T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }
template <class T> inline T atomicAnd(T* p, T v) { T old = *p; *p = old & v; return old; }
template <class T> inline T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <class T> inline T atomicCAS(T* p, T expected, T v) { T old = *p; if (old == expected) *p = v; return old; }
inline unsigned atomicInc(unsigned* p, unsigned limit) { unsigned old = *p; *p = old >= limit ? 0 : old + 1; return old; }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __trap() { emulator_fail("__trap()"); }
#define __builtin_assume(x)
#define __builtin_assume_aligned_emulated(p, n) (p)
