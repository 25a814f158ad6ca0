// Q5_K: weight = d * scale * q - dmin * minimum, 6-bit scales and minimums of 32 columns.
#pragma once
#include "weight_common.cuh"

struct Q5_K {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 1, kTileBytes = 36;
  static constexpr bool kHasMinimum = true;
  struct Parts {
    const uint4 *codes, *heads;
    const uint32_t* high;
    int stride;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)) {
      const long long high_at = part_bytes(n_rows, stride * 16);
      codes = part_at<uint4>(base, 0);
      high = part_at<uint32_t>(base, high_at);
      heads = part_at<uint4>(base, high_at + part_bytes(n_rows, stride * 4));
    }
  };
  struct Tile {
    uint4 codes, head;
    uint32_t high;
  };
  template <class Visit>
  static DEVICE void visit(Visit&& v, Tile& t, const Parts& p, int row, int unit) {
    const int at = row * p.stride + unit;
    v(t.codes, p.codes + at);
    v(t.head, p.heads + (at >> 3));
    v(t.high, p.high + at);
  }
  static DEVICE void unpack(const Tile& t, int* q) {
    nibbles_at<0>(t.codes, q);
    bits_at<4>(t.high, q);
  }
  static DEVICE Factors factors(const Tile& t, int unit) {
    return head_factors(t.head, unit);
  }
};
