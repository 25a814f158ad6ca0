// F32, F16 and BF16: rows padded to 16 bytes, a step is 16 bytes of one row.
#pragma once
#include "weight_common.cuh"

template <class T, int kSize>
struct FloatType {
  static constexpr int kColumns = 16 / kSize, kWords = 0, kHalves = 1, kTileBytes = 16;
  static constexpr bool kHasMinimum = false;
  struct Parts {
    const uint4* codes;
    int stride;
    DEVICE Parts(const void* base, int, int columns) : codes(part_at<uint4>(base, 0)), stride(ceil_div(columns, kColumns)) {}
  };
  struct Tile {
    uint4 codes;
  };
  template <class Visit>
  static DEVICE void visit(Visit&& v, Tile& t, const Parts& p, int row, int step) {
    v(t.codes, p.codes + static_cast<long long>(row) * p.stride + step);
  }
  static DEVICE void decode(const Tile& t, float* out) {
#pragma unroll
    for (int c = 0; c < kColumns; c++) out[c] = T::value(word_of(t.codes, c * kSize / 4), c);
  }
};

struct F32 : FloatType<F32, 4> {
  static DEVICE float value(uint32_t word, int) { return bits_as<float>(word); }
};
struct F16 : FloatType<F16, 2> {
  static DEVICE float value(uint32_t word, int c) { return half_value(word >> (16 * (c % 2))); }
};
struct BF16 : FloatType<BF16, 2> {
  static DEVICE float value(uint32_t word, int c) { return bits_as<float>(c % 2 ? word & 0xffff0000u : word << 16); }
};
