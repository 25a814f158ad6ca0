// Keys and values in their pages: [page][kv head][BLOCK positions][HEAD columns] of one of four types. Q8_0 keeps int8 codes
// there, and a float16 scale for each 32 columns in a pool of its own, [page][kv head][BLOCK][HEAD/32].
// Defines: HEAD (a multiple of 8, of 32 for Q8_0), N_KV (kv heads), BLOCK (positions of a page).
#pragma once
#include "ptx.cuh"

#define KV_F32 0
#define KV_F16 1
#define KV_BF16 2
#define KV_Q8_0 3

constexpr float kHalfMax = 65504.0f;
constexpr float kQ8Max = 127.0f * 515.5f;  // as Q8_0 gives it back it fits float16 too

// Index of the vector of one position and head, in units of HEAD columns.
DEVICE long long kv_vector(int page, int head, int offset) {
  return (static_cast<long long>(page) * N_KV + head) * BLOCK + offset;
}

// Write columns lane, lane + 32, ... of a vector, taken from shared memory; all lanes of a warp take part.
template <int kType>
DEVICE void store_vector(const float* values, void* pool, __half* scales, long long vector) {
  const long long first = vector * HEAD;
#pragma unroll
  for (int start = 0; start < HEAD; start += 32) {
    const int column = start + lane_id();
    const float v = column < HEAD ? values[column] : 0.0f;
    if (kType == KV_Q8_0) {
      const float amax = fminf(warp_max(fabsf(v)), kQ8Max);
      const bool usable = amax > 1e-30f;
      const float code = fminf(fmaxf(rintf(v * (usable ? 127.0f / amax : 0.0f)), -127.0f), 127.0f);
      static_cast<int8_t*>(pool)[first + column] = static_cast<int8_t>(code);
      if (lane_id() == 0) scales[vector * (HEAD / 32) + start / 32] = __float2half_rn(usable ? amax / 127.0f : 0.0f);
    } else if (column < HEAD) {
      // an infinity in a stale page would turn a masked 0 * V into NaN for another request
      if (kType == KV_F16) static_cast<__half*>(pool)[first + column] = __float2half_rn(fminf(fmaxf(v, -kHalfMax), kHalfMax));
      if (kType == KV_BF16) static_cast<bf16*>(pool)[first + column] = __float2bfloat16_rn(v);
      if (kType == KV_F32) static_cast<float*>(pool)[first + column] = v;
    }
  }
}

// Eight columns as they lie in memory, so that loads can be issued long before their values are used.
template <int kType>
struct Raw8 {
  uint4 bits;
  DEVICE void load(const void* pool, const __half*, long long vector, int column) {
    bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(pool) + vector * HEAD + column);
  }
  DEVICE void widen(float (&out)[8]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 pair;
      if (kType == KV_F16) pair = __half22float2(bits_as<__half2>(words[i]));
      else pair = make_float2(bits_as<float>(words[i] << 16), bits_as<float>(words[i] & 0xffff0000u));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct Raw8<KV_F32> {
  float4 low, high;
  DEVICE void load(const void* pool, const __half*, long long vector, int column) {
    const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(pool) + vector * HEAD + column);
    low = source[0];
    high = source[1];
  }
  DEVICE void widen(float (&out)[8]) const {
    out[0] = low.x; out[1] = low.y; out[2] = low.z; out[3] = low.w;
    out[4] = high.x; out[5] = high.y; out[6] = high.z; out[7] = high.w;
  }
};

template <>
struct Raw8<KV_Q8_0> {
  uint2 codes;
  __half scale;
  DEVICE void load(const void* pool, const __half* scales, long long vector, int column) {
    codes = *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(pool) + vector * HEAD + column);
    scale = scales[vector * (HEAD / 32) + column / 32];
  }
  DEVICE void widen(float (&out)[8]) const {
    const float d = __half2float(scale);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      // code + 128 as the lowest byte of the float 2^23 + code + 128: conversions of integers are slow
      const uint32_t word = (i < 4 ? codes.x : codes.y) ^ 0x80808080u;
      out[i] = d * (bits_as<float>(__byte_perm(word, 0x4b000000u, 0x7440 + i % 4)) - 8388736.0f);
    }
  }
};
