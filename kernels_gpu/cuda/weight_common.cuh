// What the block types share. Layout: `weights_layout.py`. A type is a struct with
//   kColumns       columns of a step: what one lane multiplies at a time
//   kWords         words of four int8 codes in a step; 0 for float types, which decode to floats
//   kHalves        1, or 2 where every 16 columns have a scale
//   kHasMinimum    a multiple of the sum of x is added
//   Parts          the pointers of a matrix, with the steps of a padded row as `stride`
//   Tile           what a lane needs of one step of one row; all zeros contribute nothing
//   kTileBytes     of that, without padding
//   visit          call v(field, address) for each field of a tile: 4, 8 or 16 bytes, aligned
//   unpack         the codes of a tile as int8, columns in ascending order. Signed ones stand at the top of the byte, so that no
//                  offset is subtracted
//   factors        its scales
#pragma once
#include "ptx.cuh"

// What stands between the codes of a step and the numbers: column c is d * scale[c / 16] * code + minimum of its half.
struct Factors {
  float d;         // includes what codes at the top of a byte are too large by
  float low;       // of the minimum; sign included
  int scale[2];    // 1 for types without integer scales
  int minimum[2];
};

DEVICE float half_value(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu))); }

DEVICE int dot16(const int* a, const int* b, int sum = 0) {
  sum = __dp4a(a[0], b[0], sum);
  sum = __dp4a(a[1], b[1], sum);
  sum = __dp4a(a[2], b[2], sum);
  return __dp4a(a[3], b[3], sum);
}

// Bytes of a part of `n_rows` rows, up to where the next one begins.
DEVICE long long part_bytes(int n_rows, int row_bytes) {
  return (static_cast<long long>(n_rows) * row_bytes + 255) / 256 * 256;
}

DEVICE int units_of_row(int columns) { return (columns + 255) / 256 * 8; }
DEVICE int d_row_bytes(int columns, int size) { return (columns / 256 * size + 15) / 16 * 16; }

template <class T>
DEVICE const T* part_at(const void* base, long long offset) {
  return reinterpret_cast<const T*>(static_cast<const uint8_t*>(base) + offset);
}

// The float16 of index `at` in words that hold two each; words[at >> 1] is loaded.
DEVICE float half_of_pair(uint32_t word, int at) { return half_value(word >> (16 * (at & 1))); }

// ---- what `visit` is called with
struct LoadTile {
  template <class T>
  DEVICE void operator()(T& field, const T* from) const { field = load_cached(from); }
};
struct ClearTile {
  template <class T>
  DEVICE void operator()(T& field, const T*) const { field = T(); }
};
// A tile of each lane of a warp in shared memory, fields apart; a lane reads only what it copied.
struct CopyTile {
  uint8_t* slot;
  bool valid;  // otherwise zeros
  int at = 0;
  DEVICE CopyTile(uint8_t* slot, bool valid) : slot(slot), valid(valid) {}
  template <class T>
  DEVICE void operator()(T&, const T* from) {
    cp_async<sizeof(T)>(slot + at + lane_id() * sizeof(T), from, valid);
    at += 32 * sizeof(T);
  }
};
struct FetchTile {
  const uint8_t* slot;
  int at = 0;
  DEVICE explicit FetchTile(const uint8_t* slot) : slot(slot) {}
  template <class T>
  DEVICE void operator()(T& field, const T*) {
    field = *reinterpret_cast<const T*>(slot + at + lane_id() * sizeof(T));
    at += 32 * sizeof(T);
  }
};

// ---- unpacking. Word j of 16 bytes of nibbles: columns 4j.. in the low ones, 16 + 4j.. in the high ones.
DEVICE uint32_t word_of(const uint4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }
DEVICE uint32_t word_of(const uint2& v, int j) { return j == 0 ? v.x : v.y; }

// `v` shifted left by `n`, or right by -n.
DEVICE uint32_t shifted(uint32_t v, int n) { return n >= 0 ? v << n : v >> -n; }

// Four-bit codes into bits kAt.. of bytes; the rest of each byte is zero.
template <int kAt>
DEVICE void nibbles_at(const uint4& codes, int* q) {
  constexpr uint32_t kMask = 0x0f0f0f0fu << kAt;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    q[j] = shifted(word_of(codes, j), kAt) & kMask;
    q[4 + j] = shifted(word_of(codes, j), kAt - 4) & kMask;
  }
}

// Two-bit codes into bits kAt.. of bytes, or-ed into q.
template <int kAt>
DEVICE void pairs_at(const uint2& pairs, int* q) {
  constexpr uint32_t kMask = 0x03030303u << kAt;
#pragma unroll
  for (int g = 0; g < 8; g++) q[g] |= shifted(word_of(pairs, g / 4), kAt - 2 * (g % 4)) & kMask;
}

// One-bit codes into bit kAt of bytes, or-ed into q.
template <int kAt>
DEVICE void bits_at(uint32_t bits, int* q) {
  constexpr uint32_t kMask = 0x01010101u << kAt;
#pragma unroll
  for (int g = 0; g < 8; g++) q[g] |= shifted(bits, kAt - g) & kMask;
}

// ---- the 16 bytes of Q4_K and Q5_K for 8 units: d, dmin, low four bits of scales, of minimums, high two bits of both
DEVICE Factors head_factors(const uint4& head, int unit) {
  const int at = 4 * (unit & 7);
  const uint32_t high = head.w >> at;
  const int scale = (head.y >> at & 15) | (high & 3) << 4, minimum = (head.z >> at & 15) | (high & 12) << 2;
  return {half_value(head.x), -half_value(head.x >> 16), {scale, scale}, {minimum, minimum}};
}

// The numbers of a step, rounded as the codec rounds them: float32 products, then a float32 sum.
template <class T>
DEVICE void decode(const typename T::Tile& tile, int unit, float* out) {
  if constexpr (T::kWords == 0) {
    T::decode(tile, out);
  } else {
    int q[T::kWords];
    T::unpack(tile, q);
    const Factors f = T::factors(tile, unit);
#pragma unroll
    for (int c = 0; c < T::kColumns; c++) {
      const int h = T::kHalves == 2 ? c / 16 : 0;
      const float code = static_cast<float>(static_cast<int8_t>(q[c / 4] >> (8 * (c % 4))));
      const float value = __fmul_rn(__fmul_rn(f.d, static_cast<float>(f.scale[h])), code);
      out[c] = T::kHasMinimum ? __fadd_rn(value, __fmul_rn(f.low, static_cast<float>(f.minimum[h]))) : value;
    }
  }
}
