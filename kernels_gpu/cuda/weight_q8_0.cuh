// Q8_0: weight = d * q. A step is half a unit, so that neighbouring lanes read neighbouring 16 bytes.
#pragma once
#include "weight_common.cuh"

struct Q8_0 {
  static constexpr int kColumns = 16, kWords = 4, kHalves = 1, kTileBytes = 20;
  static constexpr bool kHasMinimum = false;
  struct Parts {
    const uint4* codes;
    const uint32_t* scales;  // of two units each
    int stride;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(2 * units_of_row(columns)) {
      codes = part_at<uint4>(base, 0);
      scales = part_at<uint32_t>(base, part_bytes(n_rows, stride * 16));
    }
  };
  struct Tile {
    uint4 codes;
    uint32_t scales;
  };
  template <class Visit>
  static DEVICE void visit(Visit&& v, Tile& t, const Parts& p, int row, int step) {
    const int at = row * p.stride + step;
    v(t.codes, p.codes + at);
    v(t.scales, p.scales + (at >> 2));
  }
  static DEVICE void unpack(const Tile& t, int* q) {
#pragma unroll
    for (int j = 0; j < 4; j++) q[j] = word_of(t.codes, j);
  }
  static DEVICE Factors factors(const Tile& t, int step) {
    return {half_of_pair(t.scales, step >> 1), 0, {1, 1}, {0, 0}};
  }
};
