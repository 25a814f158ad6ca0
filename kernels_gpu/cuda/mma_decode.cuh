// From a block's codes to float16 pairs in a few instructions, for the lane that takes columns 4t..4t+3 and 16+4t..16+4t+3
// of a unit of 32 (t = lane % 4). Tiles are parts of `weights_layout.py` in shared memory.
//
// A code is put into the mantissa of a number whose last bit is worth one (1024 + code, or 64 + code for a high nibble);
// the number is taken away again, which is exact, and one multiply-add with the scale rounds once.
#pragma once
#include "ptx.cuh"

DEVICE half2 as_half2(uint32_t bits) { return bits_as<half2>(bits); }
DEVICE uint32_t as_bits(half2 v) { return bits_as<uint32_t>(v); }
DEVICE constexpr uint32_t twice(uint32_t v) { return v << 16 | v; }
constexpr uint32_t kOneThousand = twice(0x6400);  // (1024, 1024)

// The bits of `v` under `mask` as numbers: `magic` is 1024 (64 where the mask is four bits higher) plus what is to be taken off,
// which for a two's complement code is the sign bit: xor adds it and inverts it at once.
DEVICE half2 in_mantissa(uint32_t v, uint32_t mask, uint32_t magic) {
  return __hsub2(as_half2(and_xor(v, mask, magic)), as_half2(magic));
}

// Four codes below 256, less `offset`, as two pairs.
DEVICE void widen(uint32_t codes, int offset, half2 out[2]) {
  const half2 zero = as_half2(kOneThousand + twice(offset));
  out[0] = __hsub2(as_half2(__byte_perm(codes, kOneThousand, 0x5150)), zero);
  out[1] = __hsub2(as_half2(__byte_perm(codes, kOneThousand, 0x5352)), zero);
}

// Where byte `byte` of row `row` lies in a tile of rows of kBytes (a power of two from 16). Pieces of kPiece bytes of as many rows
// as fill the banks lie in different ones; rows eight apart are alike.
template <int kBytes, int kPiece = 16>
DEVICE int tile_at(int row, int byte) {
  constexpr int kRowsALine = kBytes >= 128 ? 1 : 128 / kBytes, kPieces = (kBytes >= 128 ? 128 : kBytes) / kPiece;
  return row * kBytes + (byte ^ row / kRowsALine % kPieces * kPiece);
}

// The lane's row of a tile is g rows after the eight-row group at `group`. What depends on the lane is one number, to which a
// constant is xor-ed; `group` is an offset that the instruction holds. `fine` has bits below a piece only, `byte` none of those.
template <class T, int kBytes, int kPiece = 16>
DEVICE T tile_load(const uint8_t* group, int g, int byte, int fine = 0) {
  return *reinterpret_cast<const T*>(group + ((tile_at<kBytes, kPiece>(g, 0) + fine) ^ byte));
}

// A part of a chunk in shared memory: kUnits units of kUnitBytes in each row, or the 16 bytes around them where they are fewer.
template <int kUnits, int kUnitBytes>
struct Part {
  static constexpr int kAsked = kUnits * kUnitBytes;
  static constexpr int kBytes = kAsked == 0 ? 0 : kAsked < 16 ? 16 : kAsked;

  // First byte to fetch of a row.
  static DEVICE int from(int chunk) { return kAsked < 16 ? chunk * kAsked & ~15 : chunk * kAsked; }

  // `unit` and `byte` are constants where the code is unrolled.
  template <class T>
  static DEVICE T load(const uint8_t* group, int g, int chunk, int unit, int byte = 0, int fine = 0) {
    if constexpr (kAsked < 16) return *reinterpret_cast<const T*>(group + g * 16 + (chunk * kAsked & 15) + unit * kUnitBytes);
    return tile_load<T, kBytes>(group, g, unit * kUnitBytes + byte, fine);
  }
};

// ---- codes. kCodes, kHigh: bytes of a unit in the parts of these names; `read` gives code - offset, exactly, of a lane's
// columns. Pointers are to the eight rows of which the lane's is the one numbered g.
template <bool kSigned>
struct Nibbles {
  static constexpr int kCodes = 16, kHigh = 0;
  template <class Codes, class High>
  static DEVICE void read(const uint8_t* codes, const uint8_t*, int g, int chunk, int unit, int t, half2 out[4]) {
    constexpr uint32_t kLow = twice(kSigned ? 0x6408 : 0x6400), kTop = twice(kSigned ? 0x5480 : 0x5400);
    const uint32_t v = Codes::template load<uint32_t>(codes, g, chunk, unit, 0, 4 * t);
    const uint32_t first = __byte_perm(v, 0, 0x4140), second = __byte_perm(v, 0, 0x4342);  // bytes to 16-bit numbers
    out[0] = in_mantissa(first, twice(0x000f), kLow);
    out[1] = in_mantissa(second, twice(0x000f), kLow);
    out[2] = in_mantissa(first, twice(0x00f0), kTop);
    out[3] = in_mantissa(second, twice(0x00f0), kTop);
  }
};

template <bool kSigned>
struct NibblesBits {
  static constexpr int kCodes = 16, kHigh = 4;
  template <class Codes, class High>
  static DEVICE void read(const uint8_t* codes, const uint8_t* high, int g, int chunk, int unit, int t, half2 out[4]) {
    constexpr uint32_t kFlip = kSigned ? 0x01010101u : 0;
    const uint32_t v = Codes::template load<uint32_t>(codes, g, chunk, unit, 0, 4 * t);
    const uint32_t bits = High::template load<uint32_t>(high, g, chunk, unit) >> t;
    widen((v & 0x0f0f0f0fu) + and_xor(bits, 0x01010101u, kFlip) * 16, kSigned ? 16 : 0, out);
    widen((v >> 4 & 0x0f0f0f0fu) + and_xor(bits >> 4, 0x01010101u, kFlip) * 16, kSigned ? 16 : 0, out + 2);
  }
};

// Q6_K.
struct NibblesPairs {
  static constexpr int kCodes = 16, kHigh = 8;
  template <class Codes, class High>
  static DEVICE void read(const uint8_t* codes, const uint8_t* high, int g, int chunk, int unit, int t, half2 out[4]) {
    constexpr uint32_t kFlip = 0x02020202u;
    const uint32_t v = Codes::template load<uint32_t>(codes, g, chunk, unit, 0, 4 * t);
    const uint2 pairs = High::template load<uint2>(high, g, chunk, unit);
    widen((v & 0x0f0f0f0fu) + and_xor(pairs.x >> 2 * t, 0x03030303u, kFlip) * 16, 32, out);
    widen((v >> 4 & 0x0f0f0f0fu) + and_xor(pairs.y >> 2 * t, 0x03030303u, kFlip) * 16, 32, out + 2);
  }
};

// Q2_K.
struct Pairs {
  static constexpr int kCodes = 8, kHigh = 0;
  template <class Codes, class High>
  static DEVICE void read(const uint8_t* codes, const uint8_t*, int g, int chunk, int unit, int t, half2 out[4]) {
    const uint2 pairs = Codes::template load<uint2>(codes, g, chunk, unit);
    widen(pairs.x >> 2 * t & 0x03030303u, 0, out);
    widen(pairs.y >> 2 * t & 0x03030303u, 0, out + 2);
  }
};

// Q3_K.
struct PairsBits {
  static constexpr int kCodes = 8, kHigh = 4;
  template <class Codes, class High>
  static DEVICE void read(const uint8_t* codes, const uint8_t* high, int g, int chunk, int unit, int t, half2 out[4]) {
    constexpr uint32_t kFlip = 0x01010101u;
    const uint2 pairs = Codes::template load<uint2>(codes, g, chunk, unit);
    const uint32_t bits = High::template load<uint32_t>(high, g, chunk, unit) >> t;
    widen((pairs.x >> 2 * t & 0x03030303u) + and_xor(bits, 0x01010101u, kFlip) * 4, 4, out);
    widen((pairs.y >> 2 * t & 0x03030303u) + and_xor(bits >> 4, 0x01010101u, kFlip) * 4, 4, out + 2);
  }
};

// Q8_0.
struct SignedBytes {
  static constexpr int kCodes = 32, kHigh = 0;
  template <class Codes, class High>
  static DEVICE void read(const uint8_t* codes, const uint8_t*, int g, int chunk, int unit, int t, half2 out[4]) {
    widen(Codes::template load<uint32_t>(codes, g, chunk, unit, 0, 4 * t) ^ 0x80808080u, 128, out);
    widen(Codes::template load<uint32_t>(codes, g, chunk, unit, 16, 4 * t) ^ 0x80808080u, 128, out + 2);
  }
};
