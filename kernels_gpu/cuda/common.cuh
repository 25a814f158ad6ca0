// What every kernel may use: integer types (NVRTC has no stdint.h), float16, vectors of 16 bytes, sums over a warp.
#pragma once
#ifdef PYINFER_EMULATE
#include "emulator.h"
#else
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif
// Dynamic shared memory as an array: DYNAMIC_SHARED(float, scratch);
#define DYNAMIC_SHARED(type, name) \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_bytes)
#endif
#define DEVICE __device__ __forceinline__
#define FULL_WARP 0xffffffffu
typedef __nv_bfloat16 bf16;

DEVICE int lane_id() { return threadIdx.x & 31; }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Every lane gets the result; all 32 lanes must take part.
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, o));
  return v;
}

DEVICE int warp_sum(int v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}

// Bits of one type as another of the same size.
template <class To, class From>
DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
