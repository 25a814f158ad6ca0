// CUDA's language for g++: qualifiers, indices, vector types, intrinsics and warp functions, as far as the kernels use them.
#pragma once
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's own math.h: libstdc++'s takes longer to read than all else here
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "runtime.h"

#define __global__ inline  // so that only the kernel that is asked for is compiled
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const
#define __shared__ static __attribute__((section("pyinfer_shared")))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator_dynamic_shared())
#define threadIdx emulator_thread
#define blockIdx emulator_block
#define blockDim emulator_block_size
#define gridDim emulator_grid_size
static const int warpSize = 32;

// ---- vector types, aligned as on the device
#define EMULATOR_VECTORS(T, name, a2, a4)                          \
  struct name##1 { T x; };                                         \
  struct __align__(a2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                   \
  struct __align__(a4) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }       \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned int, uint, 8, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(double, double, 16, 16)
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#include "emulator_half.h"
#include "emulator_math.h"
#include "emulator_warp.h"
