// Q6_K: weight = d * scale * (q - 32), int8 scales of 16 columns, codes signed in the layout.
#pragma once
#include "weight_common.cuh"

struct Q6_K {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 2, kShift = 2;
  static constexpr bool kHasMinimum = false;
  struct Parts {
    const uint4* codes;
    const uint2* high;
    const uint16_t* scales;
    const uint8_t* d;
    int stride, d_bytes;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)), d_bytes(d_row_bytes(columns, 2)) {
      const long long high_at = part_bytes(n_rows, stride * 16), scales_at = high_at + part_bytes(n_rows, stride * 8);
      codes = part_at<uint4>(base, 0);
      high = part_at<uint2>(base, high_at);
      scales = part_at<uint16_t>(base, scales_at);
      d = part_at<uint8_t>(base, scales_at + part_bytes(n_rows, stride * 2));
    }
  };
  struct Tile {
    uint4 codes;
    uint2 high;
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
    t.codes = make_uint4(0, 0, 0, 0);
    t.high = make_uint2(0, 0);
    t.scales = t.d = 0;
  }
  static DEVICE void unpack(const Tile& t, int* q) {
    nibbles_at<2>(t.codes, q);
    pairs_at<6>(t.high, q);
  }
  static DEVICE Factors factors(const Tile& t, int) {
    return {half_value(t.d) * (1.f / 4), 0, {static_cast<int8_t>(t.scales), static_cast<int8_t>(t.scales >> 8)}, {0, 0}};
  }
};
