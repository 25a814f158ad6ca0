// Q2_K: weight = d * scale * q - dmin * minimum, scales and minimums of 16 columns.
#pragma once
#include "weight_common.cuh"

struct Q2_K {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 2, kTileBytes = 16;
  static constexpr bool kHasMinimum = true;
  struct Parts {
    const uint2* codes;
    const uint32_t *scales, *d;  // scales of two units each
    int stride, d_words;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)), d_words(d_row_bytes(columns, 4) / 4) {
      const long long scales_at = part_bytes(n_rows, stride * 8);
      codes = part_at<uint2>(base, 0);
      scales = part_at<uint32_t>(base, scales_at);
      d = part_at<uint32_t>(base, scales_at + part_bytes(n_rows, stride * 2));
    }
  };
  struct Tile {
    uint2 codes;
    uint32_t scales, dm;
  };
  template <class Visit>
  static DEVICE void visit(Visit&& v, Tile& t, const Parts& p, int row, int unit) {
    const int at = row * p.stride + unit;
    v(t.codes, p.codes + at);
    v(t.scales, p.scales + (at >> 1));
    v(t.dm, p.d + static_cast<long long>(row) * p.d_words + (unit >> 3));
  }
  static DEVICE void unpack(const Tile& t, int* q) {
#pragma unroll
    for (int g = 0; g < 8; g++) q[g] = word_of(t.codes, g / 4) >> (2 * (g % 4)) & 0x03030303u;
  }
  static DEVICE Factors factors(const Tile& t, int unit) {
    const int s = t.scales >> (16 * (unit & 1));
    return {half_value(t.dm), -half_value(t.dm >> 16), {s & 15, s >> 8 & 15}, {s >> 4 & 15, s >> 12 & 15}};
  }
};
