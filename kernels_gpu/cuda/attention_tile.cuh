// Keys and values as tiles of 16-bit elements in shared memory, and pairs of floats as operands beside them.
// Defines: those of kv.cuh, WARPS, COLUMNS (positions of a tile).
#pragma once
#include "kv.cuh"
#ifdef N_DIMS
#include "rotate.cuh"
#endif

constexpr int kThreads = 32 * WARPS;
constexpr int kStride = HEAD + 8;  // halves of a row in shared memory: ldmatrix then meets no bank twice

// Two floats as the 16-bit elements of one operand, the first in the low half.
template <bool kWide>
DEVICE uint32_t pack(float a, float b) {
  if (kWide) return bits_as<uint32_t>(__floats2bfloat162_rn(a, b));
  return bits_as<uint32_t>(__floats2half2_rn(a, b));
}

// What `pack` loses of a and b, packed.
template <bool kWide>
DEVICE uint32_t pack_rest(float a, float b, uint32_t packed) {
  if (kWide) return pack<kWide>(a - bits_as<float>(packed << 16), b - bits_as<float>(packed & 0xffff0000u));
  const float2 kept = __half22float2(bits_as<__half2>(packed));
  return pack<kWide>(a - kept.x, b - kept.y);
}

template <bool kWide>
DEVICE void multiply(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  if (kWide) mma_bf16(d, a, b);
  else mma_f16(d, a, b);
}

// Columns `column`, even, and the next of a head; with N_DIMS rotated by the (cos, sin) of its token.
DEVICE float2 query_pair(const float* head, int column, const float2* angles) {
  const float2 v = *reinterpret_cast<const float2*>(head + column);
#ifdef N_DIMS
  constexpr int kHalf = N_DIMS / 2;
  static_assert(kHalf % 2 == 0, "both columns are of one half");
  if (column >= N_DIMS) return v;
  if (PAIRING == PAIRING_INTERLEAVED) {
    const float2 turn = angles[column / 2];
    return make_float2(v.x * turn.x - v.y * turn.y, v.x * turn.y + v.y * turn.x);
  }
  const bool is_first = column < kHalf;
  const float2 other = *reinterpret_cast<const float2*>(head + (is_first ? column + kHalf : column - kHalf));
  const float4 turns = *reinterpret_cast<const float4*>(angles + column % kHalf);
  if (is_first) return make_float2(v.x * turns.x - other.x * turns.y, v.y * turns.z - other.y * turns.w);
  return make_float2(other.x * turns.y + v.x * turns.x, other.y * turns.w + v.y * turns.z);
#else
  return v;
#endif
}

// Pages of a tile, whose first position is a multiple of COLUMNS; as many as there are positions where pages may begin anywhere.
constexpr bool kInPage = BLOCK % COLUMNS == 0, kOfPages = COLUMNS % BLOCK == 0;
constexpr int kTilePages = kInPage ? 1 : kOfPages ? COLUMNS / BLOCK : 0;

// What a thread reads of the table for the tile at `begin`; pages that hold none of first..end - 1 are never asked for.
DEVICE void find_pages(int (&pages)[kTilePages + 1], const int* table, int begin, int first, int end) {
#pragma unroll
  for (int p = 0; p < kTilePages; p++)
    pages[p] = table[static_cast<unsigned>(min(max(begin + p * BLOCK, first), end - 1)) / BLOCK];
}

// COLUMNS vectors from position `begin` on into rows of shared memory; positions outside first..end - 1 become zeros.
// `pages` are those of `find_pages`.
template <int kType>
DEVICE void load_tile(uint16_t* target, const void* pool, const __half* scales, const int* table,
                      const int (&pages)[kTilePages + 1], int kv_head, int begin, int first, int end) {
  constexpr int kElements = kType == KV_Q8_0 ? 16 : 8;  // of 16 bytes
  constexpr int kChunks = HEAD / kElements, kStep = kThreads / kChunks;
  // a thread's rows are a constant apart, and which page holds them does not depend on the thread
  constexpr bool kEven = kThreads % kChunks == 0 && COLUMNS % kStep == 0 && (kInPage || (kOfPages && BLOCK % kStep == 0));
#pragma unroll
  for (int i = 0; i < (COLUMNS * kChunks + kThreads - 1) / kThreads; i++) {
    const unsigned piece = threadIdx.x + i * kThreads;
    if (COLUMNS * kChunks % kThreads && piece >= COLUMNS * kChunks) break;
    const int row = kEven ? threadIdx.x / kChunks + i * kStep : piece / kChunks;
    const int column = (kEven ? threadIdx.x % kChunks : piece % kChunks) * kElements, position = begin + row;
    const bool there = static_cast<unsigned>(position - first) < static_cast<unsigned>(end - first);
    long long vector;
    if (kEven) {
      const int before = kInPage ? static_cast<unsigned>(begin) % BLOCK : 0;
      vector = kv_vector(pages[kInPage ? 0 : i * kStep / BLOCK], kv_head, before + threadIdx.x / kChunks + i * kStep % BLOCK);
    } else {
      const unsigned known = there ? position : end - 1;
      vector = kv_vector(table[known / BLOCK], kv_head, known % BLOCK);
    }
    uint16_t* place = target + row * kStride + column;
    if (kType != KV_Q8_0) {
      cp_async16(place, static_cast<const uint16_t*>(pool) + vector * HEAD + column, there);
      continue;
    }
    const uint4 codes = *reinterpret_cast<const uint4*>(static_cast<const int8_t*>(pool) + vector * HEAD + column);
    const __half2 d = __half2half2(there ? scales[vector * (HEAD / 32) + column / 32] : __float2half_rn(0.0f));
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t halves[8];
#pragma unroll
    for (int w = 0; w < 8; w++) {
      const uint32_t pair = words[w / 2] >> 16 * (w % 2);
      const __half2 value = __floats2half2_rn(static_cast<int8_t>(pair), static_cast<int8_t>(pair >> 8));
      halves[w] = bits_as<uint32_t>(__hmul2(value, d));
    }
    const uint4 low = make_uint4(halves[0], halves[1], halves[2], halves[3]);
    const uint4 high = make_uint4(halves[4], halves[5], halves[6], halves[7]);
    uint4* wide = reinterpret_cast<uint4*>(place);
    const int part = threadIdx.x >> 2 & 1;  // lanes four apart would meet in the same banks
    wide[part] = part ? high : low;
    wide[part ^ 1] = part ? low : high;
  }
}
