// Q3_K: weight = d * scale * (q - 4), int8 scales of 16 columns, codes signed in the layout.
#pragma once
#include "weight_common.cuh"

struct Q3_K {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 2, kShift = 5;
  static constexpr bool kHasMinimum = false;
  struct Parts {
    const uint2* codes;
    const uint32_t* high;
    const uint16_t* scales;
    const uint8_t* d;
    int stride, d_bytes;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)), d_bytes(d_row_bytes(columns, 2)) {
      const long long high_at = part_bytes(n_rows, stride * 8), scales_at = high_at + part_bytes(n_rows, stride * 4);
      codes = part_at<uint2>(base, 0);
      high = part_at<uint32_t>(base, high_at);
      scales = part_at<uint16_t>(base, scales_at);
      d = part_at<uint8_t>(base, scales_at + part_bytes(n_rows, stride * 2));
    }
  };
  struct Tile {
    uint2 codes;
    uint32_t high;
    uint16_t scales, d;
  };
  static DEVICE void load(Tile& t, const Parts& p, int row, int unit) {
    const int at = row * p.stride + unit;
    t.codes = load_stream(p.codes + at);
    t.high = load_stream(p.high + at);
    t.scales = load_cached(p.scales + at);
    t.d = load_cached(reinterpret_cast<const uint16_t*>(p.d + static_cast<long long>(row) * p.d_bytes) + (unit >> 3));
  }
  static DEVICE void clear(Tile& t) {
    t.codes = make_uint2(0, 0);
    t.high = 0;
    t.scales = t.d = 0;
  }
  static DEVICE void unpack(const Tile& t, int* q) {
#pragma unroll
    for (int g = 0; g < 8; g++) q[g] = 0;
    pairs_at<5>(t.codes, q);
    bits_at<7>(t.high, q);
  }
  static DEVICE Factors factors(const Tile& t, int) {
    return {half_value(t.d) * (1.f / 32), 0, {static_cast<int8_t>(t.scales), static_cast<int8_t>(t.scales >> 8)}, {0, 0}};
  }
};
