// Q2_K: weight = d * scale * q - dmin * minimum, scales and minimums of 16 columns.
#pragma once
#include "weight_common.cuh"

struct Q2_K {
  static constexpr int kColumns = 32, kWords = 8, kHalves = 2, kShift = 0;
  static constexpr bool kHasMinimum = true;
  struct Parts {
    const uint2* codes;
    const uint16_t* scales;
    const uint8_t* d;
    int stride, d_bytes;
    DEVICE Parts(const void* base, int n_rows, int columns) : stride(units_of_row(columns)), d_bytes(d_row_bytes(columns, 4)) {
      const long long scales_at = part_bytes(n_rows, stride * 8);
      codes = part_at<uint2>(base, 0);
      scales = part_at<uint16_t>(base, scales_at);
      d = part_at<uint8_t>(base, scales_at + part_bytes(n_rows, stride * 2));
    }
  };
  struct Tile {
    uint2 codes;
    uint16_t scales;
    uint32_t dm;
  };
  static DEVICE void load(Tile& t, const Parts& p, int row, int unit) {
    const int at = row * p.stride + unit;
    t.codes = load_stream(p.codes + at);
    t.scales = load_cached(p.scales + at);
    t.dm = load_cached(reinterpret_cast<const uint32_t*>(p.d + static_cast<long long>(row) * p.d_bytes) + (unit >> 3));
  }
  static DEVICE void clear(Tile& t) {
    t.codes = make_uint2(0, 0);
    t.scales = 0;
    t.dm = 0;
  }
  static DEVICE void unpack(const Tile& t, int* q) {
#pragma unroll
    for (int g = 0; g < 8; g++) q[g] = word_of(t.codes, g / 4) >> (2 * (g % 4)) & 0x03030303u;
  }
  static DEVICE Factors factors(const Tile& t, int) {
    return {half_value(t.dm), -half_value(t.dm >> 16), {t.scales & 15, t.scales >> 8 & 15}, {t.scales >> 4 & 15, t.scales >> 12}};
  }
};
