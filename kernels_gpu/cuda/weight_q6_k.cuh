// Q6_K: weight = d * scale * (q - 32), int8 scales of 16 columns, codes signed in the layout.
#pragma once
#include "weight_common.cuh"

struct Q6_K {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 2, kTileBytes = 32;
  static constexpr bool kHasMinimum = false;
  struct Parts {
    const uint4* codes;
    const uint2* high;
    const uint32_t *scales, *d;  // scales of two units each, d of 16
    int stride, d_words;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)), d_words(d_row_bytes(columns, 2) / 4) {
      const long long high_at = part_bytes(n_rows, stride * 16), scales_at = high_at + part_bytes(n_rows, stride * 8);
      codes = part_at<uint4>(base, 0);
      high = part_at<uint2>(base, high_at);
      scales = part_at<uint32_t>(base, scales_at);
      d = part_at<uint32_t>(base, scales_at + part_bytes(n_rows, stride * 2));
    }
  };
  struct Tile {
    uint4 codes;
    uint2 high;
    uint32_t scales, d;
  };
  template <class Visit>
  static DEVICE void visit(Visit&& v, Tile& t, const Parts& p, int row, int unit) {
    const int at = row * p.stride + unit;
    v(t.codes, p.codes + at);
    v(t.high, p.high + at);
    v(t.scales, p.scales + (at >> 1));
    v(t.d, p.d + static_cast<long long>(row) * p.d_words + (unit >> 4));
  }
  static DEVICE void unpack(const Tile& t, int* q) {
    nibbles_at<2>(t.codes, q);
    pairs_at<6>(t.high, q);
  }
  static DEVICE Factors factors(const Tile& t, int unit) {
    const int s = t.scales >> (16 * (unit & 1));
    return {half_of_pair(t.d, unit >> 3) * (1.f / 4), 0, {static_cast<int8_t>(s), static_cast<int8_t>(s >> 8)}, {0, 0}};
  }
};
