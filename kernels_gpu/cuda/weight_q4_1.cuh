// Q4_1: weight = d * q + m.
#pragma once
#include "weight_common.cuh"

struct Q4_1 {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 1, kTileBytes = 20;
  static constexpr bool kHasMinimum = true;
  struct Parts {
    const uint4* codes;
    const uint32_t* scales;
    int stride;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)) {
      codes = part_at<uint4>(base, 0);
      scales = part_at<uint32_t>(base, part_bytes(n_rows, stride * 16));
    }
  };
  struct Tile {
    uint4 codes;
    uint32_t dm;
  };
  template <class Visit>
  static DEVICE void visit(Visit&& v, Tile& t, const Parts& p, int row, int unit) {
    const int at = row * p.stride + unit;
    v(t.codes, p.codes + at);
    v(t.dm, p.scales + at);
  }
  static DEVICE void unpack(const Tile& t, int* q) {
    nibbles_at<0>(t.codes, q);
  }
  static DEVICE Factors factors(const Tile& t, int ) {
    return {half_value(t.dm), half_value(t.dm >> 16), {1, 1}, {1, 1}};
  }
};
