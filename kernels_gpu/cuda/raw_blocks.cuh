// How to read blocks as they lie in a GGUF file (`quant/`), byte by byte: they are not aligned. For each type
//   kBytes, kUnits   of a block; units of 32 columns
//   kLow, kHigh      bits of a code that the packed layout keeps in its parts `codes` and `high`
//   code             that of column i of unit u, as the layout has it: signed ones as two's complement
//   scales           writes the scales of unit u to the packed matrix p; `at` counts units of the matrix, `unit` of the row
#pragma once
#include "weights.cuh"

namespace raw {

DEVICE int nibble(const uint8_t* b, int i) { return b[i % 16] >> (i / 16 * 4) & 15; }
DEVICE uint16_t two_bytes(const uint8_t* b) { return static_cast<uint16_t>(b[0] | b[1] << 8); }
DEVICE uint32_t four_bytes(const uint8_t* b) { return two_bytes(b) | static_cast<uint32_t>(two_bytes(b + 2)) << 16; }

template <class T>
DEVICE void put(const void* part, int at, T value) {
  static_cast<T*>(const_cast<void*>(part))[at] = value;
}

struct Q4_0 {
  static constexpr int kBytes = 18, kUnits = 1, kLow = 4, kHigh = 0;
  static DEVICE int code(const uint8_t* b, int, int i) { return nibble(b + 2, i) ^ 8; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int, const Parts& p, int at, int, int) {
    put(p.scales, at, two_bytes(b));
  }
};

struct Q4_1 {
  static constexpr int kBytes = 20, kUnits = 1, kLow = 4, kHigh = 0;
  static DEVICE int code(const uint8_t* b, int, int i) { return nibble(b + 4, i); }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int, const Parts& p, int at, int, int) {
    put(p.scales, at, four_bytes(b));
  }
};

struct Q5_0 {
  static constexpr int kBytes = 22, kUnits = 1, kLow = 4, kHigh = 1;
  static DEVICE int code(const uint8_t* b, int, int i) { return (nibble(b + 6, i) | (b[2 + i / 8] >> i % 8 & 1) << 4) ^ 16; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int, const Parts& p, int at, int, int) {
    put(p.scales, at, two_bytes(b));
  }
};

struct Q5_1 {
  static constexpr int kBytes = 24, kUnits = 1, kLow = 4, kHigh = 1;
  static DEVICE int code(const uint8_t* b, int, int i) { return nibble(b + 8, i) | (b[4 + i / 8] >> i % 8 & 1) << 4; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int, const Parts& p, int at, int, int) {
    put(p.scales, at, four_bytes(b));
  }
};

struct Q8_0 {
  static constexpr int kBytes = 34, kUnits = 1, kLow = 8, kHigh = 0;
  static DEVICE int code(const uint8_t* b, int, int i) { return b[2 + i]; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int, const Parts& p, int at, int, int) {
    put(p.scales, at, two_bytes(b));
  }
};

struct Q2_K {
  static constexpr int kBytes = 84, kUnits = 8, kLow = 2, kHigh = 0;
  static DEVICE int code(const uint8_t* b, int u, int i) { return b[16 + u / 4 * 32 + i] >> u % 4 * 2 & 3; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int u, const Parts& p, int at, int row, int unit) {
    put(p.scales, at, two_bytes(b + 2 * u));
    if (u == 0) put(p.d + static_cast<long long>(row) * p.d_words, unit / 8, four_bytes(b + 80));
  }
};

struct Q3_K {
  static constexpr int kBytes = 110, kUnits = 8, kLow = 2, kHigh = 1;
  static DEVICE int code(const uint8_t* b, int u, int i) {
    return ((b[32 + u / 4 * 32 + i] >> u % 4 * 2 & 3) | (b[i] >> u & 1) << 2) ^ 4;
  }
  static DEVICE int scale(const uint8_t* s, int k) { return ((s[k % 8] >> k / 8 * 4 & 15) | (s[8 + k % 4] >> k / 4 * 2 & 3) << 4) - 32; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int u, const Parts& p, int at, int row, int unit) {
    const int low = scale(b + 96, 2 * u) & 255, high = scale(b + 96, 2 * u + 1) & 255;
    put(p.scales, at, static_cast<uint16_t>(low | high << 8));
    if (u == 0) put(p.d + static_cast<long long>(row) * p.d_words, unit / 8, two_bytes(b + 108));
  }
};

struct Q6_K {
  static constexpr int kBytes = 210, kUnits = 8, kLow = 4, kHigh = 2;
  static DEVICE int code(const uint8_t* b, int u, int i) {
    const int low = b[u / 4 * 64 + u % 2 * 32 + i] >> u % 4 / 2 * 4 & 15;
    return (low | (b[128 + u / 4 * 32 + i] >> u % 4 * 2 & 3) << 4) ^ 32;
  }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int u, const Parts& p, int at, int row, int unit) {
    put(p.scales, at, two_bytes(b + 192 + 2 * u));
    if (u == 0) put(p.d + static_cast<long long>(row) * p.d_words, unit / 8, two_bytes(b + 208));
  }
};

// The first 16 bytes of Q4_K and Q5_K, with their 6-bit scales and minimums (`quant/k_scales.py`) in another order.
DEVICE uint4 head(const uint8_t* b) {
  uint32_t scales = 0, minimums = 0, high = 0;
  const uint8_t* s = b + 4;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const int scale = k < 4 ? s[k] & 63 : (s[4 + k] & 15) | s[k - 4] >> 6 << 4;
    const int minimum = k < 4 ? s[4 + k] & 63 : s[4 + k] >> 4 | s[k] >> 6 << 4;
    scales |= static_cast<uint32_t>(scale & 15) << 4 * k;
    minimums |= static_cast<uint32_t>(minimum & 15) << 4 * k;
    high |= static_cast<uint32_t>(scale >> 4 | minimum >> 4 << 2) << 4 * k;
  }
  return make_uint4(four_bytes(b), scales, minimums, high);
}

struct Q4_K {
  static constexpr int kBytes = 144, kUnits = 8, kLow = 4, kHigh = 0;
  static DEVICE int code(const uint8_t* b, int u, int i) { return b[16 + u / 2 * 32 + i] >> u % 2 * 4 & 15; }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int u, const Parts& p, int at, int, int) {
    if (u == 0) put(p.heads, at / 8, head(b));
  }
};

struct Q5_K {
  static constexpr int kBytes = 176, kUnits = 8, kLow = 4, kHigh = 1;
  static DEVICE int code(const uint8_t* b, int u, int i) {
    return (b[48 + u / 2 * 32 + i] >> u % 2 * 4 & 15) | (b[16 + i] >> u & 1) << 4;
  }
  template <class Parts>
  static DEVICE void scales(const uint8_t* b, int u, const Parts& p, int at, int, int) {
    if (u == 0) put(p.heads, at / 8, head(b));
  }
};

}  // namespace raw
