// How a row of results is written: float32, "a8" or "h16", chosen by the define OUT. Four columns a lane.
// a8: int8 codes (a8.cuh), scale [n, width/32] and scale * sum of codes [n, width/32] (graph/activation.py).
// h16: float16 [n, width] with a power of two a row; a row's largest value gets the exponent 14, so nothing overflows
// and small values keep their bits.
#pragma once
#include "a8.cuh"
#include "ptx.cuh"

#define OUT_F32 0
#define OUT_A8 1
#define OUT_H16 2

// Largest of a block's values; every thread gets it. `scratch` holds 32 floats that nobody else uses.
template <int kThreads>
DEVICE float block_max(float v, float* scratch) {
  v = warp_max(v);
  if (kThreads == 32) return v;
  if (lane_id() == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  return warp_max(lane_id() < kThreads / 32 ? scratch[lane_id()] : 0.0f);
}

template <int kThreads>
DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if (kThreads == 32) return v;
  if (lane_id() == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  return warp_sum(lane_id() < kThreads / 32 ? scratch[lane_id()] : 0.0f);
}

DEVICE float largest(float4 v) { return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))); }

DEVICE float squares_of(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

DEVICE float4 scaled(float4 v, float factor, float4 w) {
  return make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w);
}

struct A8Block {
  float inverse, scale;
};

// The scale of 32 columns whose largest magnitude is amax, and what columns are multiplied with before rounding.
DEVICE A8Block a8_block(float amax) {
  const bool usable = amax > 1e-30f;
  return {usable ? 127.0f / amax : 0.0f, usable ? amax / 127.0f : 0.0f};
}

// Columns 4*chunk.. of a row as a8, numbers 4*(first + chunk).. of all rows. All lanes of a warp take part; eight neighbours hold
// one block of 32.
DEVICE void store_a8(float4 v, bool active, long long first, int chunk, void* codes, float* scales, float* sums) {
  float amax = largest(v);
#pragma unroll
  for (int o = 4; o; o >>= 1) amax = fmaxf(amax, __shfl_xor_sync(FULL_WARP, amax, o));
  const A8Block block = a8_block(amax);
  const int a = __float2int_rn(v.x * block.inverse), b = __float2int_rn(v.y * block.inverse);
  const int c = __float2int_rn(v.z * block.inverse), d = __float2int_rn(v.w * block.inverse);
  int sum = a + b + c + d;
#pragma unroll
  for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, o);
  if (!active) return;
  const long long at = first + chunk;
  static_cast<int*>(codes)[a8_place(4 * at) / 4] = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
  if (chunk % 8 == 0) {
    scales[at / 8] = block.scale;
    sums[at / 8] = block.scale * static_cast<float>(sum);
  }
}

struct RowScale {
  float scale, inverse;
};

// The power of two of an h16 row whose largest magnitude is amax.
DEVICE RowScale h16_scale(float amax) {
  const int exponent = static_cast<int>(bits_as<uint32_t>(amax) >> 23 & 255) - 127;
  const int k = max(exponent, -100) - 14;
  return {bits_as<float>(static_cast<uint32_t>(127 + k) << 23), bits_as<float>(static_cast<uint32_t>(127 - k) << 23)};
}

DEVICE uint2 as_halves(float4 v, float inverse) {
  const __half2 low = __floats2half2_rn(v.x * inverse, v.y * inverse);
  const __half2 high = __floats2half2_rn(v.z * inverse, v.w * inverse);
  return make_uint2(bits_as<uint32_t>(low), bits_as<uint32_t>(high));
}

// A whole row by one block; h16 without `scales` is the numbers as they are. Thread t holds columns 4*(t + p*kThreads).. in
// v[p], and zeros past the end.
template <int kOut, int kThreads, int kChunks, int kPer>
DEVICE void store_row(const float4 (&v)[kPer], int row, void* out, float* scales, float* sums, float* scratch) {
  const long long first = static_cast<long long>(row) * kChunks;
  float inverse = 1.0f;
  if (kOut == OUT_H16 && scales) {
    float amax = 0.0f;
#pragma unroll
    for (int p = 0; p < kPer; p++) amax = fmaxf(amax, largest(v[p]));
    const RowScale scaled = h16_scale(block_max<kThreads>(amax, scratch));
    if (threadIdx.x == 0) scales[row] = scaled.scale;
    inverse = scaled.inverse;
  }
#pragma unroll
  for (int p = 0; p < kPer; p++) {
    const int chunk = threadIdx.x + p * kThreads;
    const bool active = chunk < kChunks;
    if (kOut == OUT_A8) {
      store_a8(v[p], active, first, chunk, out, scales, sums);
    } else if (active) {
      if (kOut == OUT_F32) static_cast<float4*>(out)[first + chunk] = v[p];
      else static_cast<uint2*>(out)[first + chunk] = as_halves(v[p], inverse);
    }
  }
}
