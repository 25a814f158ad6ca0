// How `matmul_mma` brings each weight type into shared memory and makes float16 of it. Layout: `weights_layout.py`.
//
// A type is a struct with
//   kColumns    columns of a chunk, which is what a stage of the ring holds of each row
//   kRowBytes   bytes that a row of a chunk takes in shared memory
//   kGain       decoded weights are this times the weights
//   stage       ask for a chunk: rows past the end repeat the last one, columns past the end of a float type become zeros
//   decode      a lane's eight columns of each of two units of row row + g, where row is a multiple of 8 (mma_decode.cuh)
#pragma once
#include "mma_decode.cuh"

DEVICE constexpr int whole(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Copy kBytes (a multiple of 16) of each of kRows rows from byte `from` of rows that are `stride` bytes long; with kMayEnd what
// is past the end of a row becomes zeros. Offsets are counted in 16 bytes, and the rows of a thread are a constant apart.
template <int kBytes, int kRows, int kThreads, int kPiece = 16, bool kMayEnd = false>
DEVICE void stage_part(uint8_t* tile, const uint8_t* part, int stride, int from, int first, int n_rows) {
  constexpr int kPieces = kBytes / 16, kTotal = kRows * kPieces, kStep = kThreads / kPieces;
  const int row = threadIdx.x / kPieces, byte = threadIdx.x % kPieces * 16, stride16 = stride / 16;
  const uint4* source = reinterpret_cast<const uint4*>(part + from + byte);
  const bool valid = !kMayEnd || from + byte < stride;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; i++) {
    if (kTotal % kThreads && threadIdx.x + i * kThreads >= kTotal) break;
    const int to = kStep % 8 == 0 ? tile_at<kBytes, kPiece>(row, byte) + i * kStep * kBytes
                                  : tile_at<kBytes, kPiece>(row + i * kStep, byte);
    cp_async16(tile + to, source + min((first + row) * stride16 + i * kStep * stride16, (n_rows - 1) * stride16), valid);
  }
}

// ---- scales. kScales, kD: bytes of a unit in the part "scales" ("heads"), of 8 units in the part "d". `apply` makes weights of
// the codes of two units. Scales are taken times 64: below 6e-5 float16 would lose digits. Weights must stay below 1,023.
constexpr float kScaleGain = 64.f;
constexpr uint32_t kGainPair = twice(0x5400);    // (64, 64)
constexpr uint32_t kGainNegated = 0xd4005400u;  // (64, -64)

// One float16 d, or d and m: weight = d * code (+ m).
template <bool kMinimum>
struct UnitFactors {
  static constexpr int kScales = kMinimum ? 4 : 2, kD = 0;
  template <class Scales>
  static DEVICE void apply(const uint8_t* scales, const uint8_t*, int g, int chunk, int unit, half2 (&w)[2][4]) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
      if (kMinimum) {
        const half2 f = __hmul2(as_half2(Scales::template load<uint32_t>(scales, g, chunk, unit + u)), as_half2(kGainPair));
#pragma unroll
        for (int i = 0; i < 4; i++) w[u][i] = __hfma2(w[u][i], __low2half2(f), __high2half2(f));
      } else {
        const uint32_t bits = Scales::template load<uint16_t>(scales, g, chunk, unit + u);
        const half2 d = __hmul2(as_half2(twice(bits)), as_half2(kGainPair));
#pragma unroll
        for (int i = 0; i < 4; i++) w[u][i] = __hmul2(w[u][i], d);
      }
    }
  }
};

// Q4_K and Q5_K: weight = d * scale * code - dmin * minimum. The scale and the minimum of a unit are made side by side in one
// register: their low four bits as 1024 (or 64) + n, the high two in the mantissa of a number whose last bit used is worth 16.
struct Heads {
  static constexpr int kScales = 2, kD = 0;
  template <class Scales>
  static DEVICE void apply(const uint8_t* heads, const uint8_t*, int g, int chunk, int unit, half2 (&w)[2][4]) {
    const uint4 head = Scales::template load<uint4>(heads, g, chunk, 0);
    const int byte = unit / 2;  // of these two units
    const uint32_t low = __byte_perm(head.y, head.z, 0x0400 + byte * 0x0101), high = __byte_perm(head.w, 0, byte * 0x0101);
    const half2 low0 = as_half2(and_xor(low, 0x000f000fu, 0x64006400u));    // 1024 + scale, 1024 + minimum
    const half2 low1 = as_half2(and_xor(low, 0x00f000f0u, 0x54005400u));    // 64 + ...
    const half2 high0 = as_half2(and_xor(high, 0x000c0003u, 0x6c007400u));  // 16384 + 16 * scale, 4096 + 16 * minimum
    const half2 high1 = as_half2(and_xor(high, 0x00c00030u, 0x5c006400u));  // 1024 + ..., 256 + ...
    const half2 d = __hmul2(as_half2(head.x), as_half2(kGainNegated));
    const half2 f0 = __hmul2(__hadd2(low0, __hsub2(high0, as_half2(0x6d007440u))), d);  // less 16384 + 1024, 4096 + 1024
    const half2 f1 = __hmul2(__hadd2(low1, __hsub2(high1, as_half2(0x5d006440u))), d);  // less 1024 + 64, 256 + 64
#pragma unroll
    for (int i = 0; i < 4; i++) {
      w[0][i] = __hfma2(w[0][i], __low2half2(f0), __high2half2(f0));
      w[1][i] = __hfma2(w[1][i], __low2half2(f1), __high2half2(f1));
    }
  }
};

// Q3_K and Q6_K: weight = d * scale * code, int8 scales of 16 columns.
struct SignedScales {
  static constexpr int kScales = 2, kD = 2;
  template <class Scales>
  static DEVICE void apply(const uint8_t* scales, const uint8_t* d, int g, int chunk, int unit, half2 (&w)[2][4]) {
    half2 s[2];
    widen(Scales::template load<uint32_t>(scales, g, chunk, unit) ^ 0x80808080u, 128, s);
    const half2 factor = __hmul2(as_half2(twice(Part<1, 2>::load<uint16_t>(d, g, chunk, 0))), as_half2(kGainPair));
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const half2 f = __hmul2(s[u], factor);
#pragma unroll
      for (int i = 0; i < 4; i++) w[u][i] = __hmul2(w[u][i], i < 2 ? __low2half2(f) : __high2half2(f));
    }
  }
};

// Q2_K: weight = d * scale * code - dmin * minimum, of 16 columns, a byte for both.
struct ScaleMinimumBytes {
  static constexpr int kScales = 2, kD = 4;
  template <class Scales>
  static DEVICE void apply(const uint8_t* scales, const uint8_t* d, int g, int chunk, int unit, half2 (&w)[2][4]) {
    const uint32_t bytes = Scales::template load<uint32_t>(scales, g, chunk, unit);
    const half2 factors = __hmul2(as_half2(Part<1, 4>::load<uint32_t>(d, g, chunk, 0)), as_half2(kGainNegated));
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const uint32_t pair = __byte_perm(bytes, 0, u ? 0x4342 : 0x4140);
      const half2 scale = __hmul2(in_mantissa(pair, twice(0x000f), twice(0x6400)), __low2half2(factors));
      const half2 minimum = __hmul2(in_mantissa(pair, twice(0x00f0), twice(0x5400)), __high2half2(factors));
#pragma unroll
      for (int i = 0; i < 4; i++)
        w[u][i] = i < 2 ? __hfma2(w[u][i], __low2half2(scale), __low2half2(minimum))
                        : __hfma2(w[u][i], __high2half2(scale), __high2half2(minimum));
    }
  }
};

// ---- the types
template <class CodeType, class ScaleType, int kUnits>
struct BlockFormat {
  using Codes = Part<kUnits, CodeType::kCodes>;
  using High = Part<kUnits, CodeType::kHigh>;
  using Scales = Part<kUnits, ScaleType::kScales>;
  using D = Part<1, ScaleType::kD>;
  static constexpr int kColumns = kUnits * 32;
  static constexpr int kRowBytes = Codes::kBytes + High::kBytes + Scales::kBytes + D::kBytes;
  static constexpr float kGain = kScaleGain;

  template <int kRows, int kThreads>
  static DEVICE void stage(const uint8_t* weight, uint8_t* tile, int first, int n_rows, int chunk, int columns) {
    const int blocks = (columns + 255) / 256;
    stage_one<Codes, CodeType::kCodes * 8, kRows, kThreads>(weight, tile, first, n_rows, chunk, blocks);
    stage_one<High, CodeType::kHigh * 8, kRows, kThreads>(weight, tile, first, n_rows, chunk, blocks);
    stage_one<Scales, ScaleType::kScales * 8, kRows, kThreads>(weight, tile, first, n_rows, chunk, blocks);
    stage_one<D, ScaleType::kD, kRows, kThreads>(weight, tile, first, n_rows, chunk, blocks);
  }

  template <int kRows>
  static DEVICE void decode(const uint8_t* tile, int row, int g, int t, int chunk, int pair, uint32_t (&out)[2][4]) {
    const uint8_t* codes = tile + row * Codes::kBytes;
    const uint8_t* high = tile + kRows * Codes::kBytes + row * High::kBytes;
    const uint8_t* scales = tile + kRows * (Codes::kBytes + High::kBytes) + row * Scales::kBytes;
    const uint8_t* d = tile + kRows * (Codes::kBytes + High::kBytes + Scales::kBytes) + row * D::kBytes;
    half2 w[2][4];
    CodeType::template read<Codes, High>(codes, high, g, chunk, 2 * pair, t, w[0]);
    CodeType::template read<Codes, High>(codes, high, g, chunk, 2 * pair + 1, t, w[1]);
    ScaleType::template apply<Scales>(scales, d, g, chunk, 2 * pair, w);
#pragma unroll
    for (int i = 0; i < 8; i++) out[i / 4][i % 4] = as_bits(w[i / 4][i % 4]);
  }

 private:
  // One part; `weight` and `tile` move on to the next.
  template <class P, int kBlockBytes, int kRows, int kThreads>
  static DEVICE void stage_one(const uint8_t*& weight, uint8_t*& tile, int first, int n_rows, int chunk, int blocks) {
    if constexpr (kBlockBytes > 0) {
      const int row_bytes = whole(blocks * kBlockBytes, 16);
      stage_part<P::kBytes, kRows, kThreads>(tile, weight, row_bytes, P::from(chunk), first, n_rows);
      weight += (static_cast<long long>(n_rows) * row_bytes + 255) / 256 * 256;
      tile += kRows * P::kBytes;
    }
  }
};

// F16 and BF16, which becomes F16: what is below 6e-8 or above 65,504 is lost.
template <bool kBrain>
struct FloatFormat {
  static constexpr int kColumns = 64, kRowBytes = 128;
  static constexpr float kGain = 1.f;

  template <int kRows, int kThreads>
  static DEVICE void stage(const uint8_t* weight, uint8_t* tile, int first, int n_rows, int chunk, int columns) {
    stage_part<128, kRows, kThreads, 32, true>(tile, weight, whole(columns * 2, 16), chunk * 128, first, n_rows);
  }

  template <int kRows>
  static DEVICE void decode(const uint8_t* tile, int row, int g, int t, int, int, uint32_t (&out)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint2 v = tile_load<uint2, 128, 32>(tile + row * 128, g, i * 32, 8 * t);
      out[i / 2][i % 2 * 2] = pair(v.x);
      out[i / 2][i % 2 * 2 + 1] = pair(v.y);
    }
  }

 private:
  static DEVICE uint32_t pair(uint32_t bits) {
    return kBrain ? as_bits(__floats2half2_rn(bits_as<float>(bits << 16), bits_as<float>(bits & 0xffff0000u))) : bits;
  }
};

#ifndef UNITS
#define UNITS 8
#endif
using F16 = FloatFormat<false>;
using BF16 = FloatFormat<true>;
using Q4_0 = BlockFormat<Nibbles<true>, UnitFactors<false>, UNITS>;
using Q4_1 = BlockFormat<Nibbles<false>, UnitFactors<true>, UNITS>;
using Q5_0 = BlockFormat<NibblesBits<true>, UnitFactors<false>, UNITS>;
using Q5_1 = BlockFormat<NibblesBits<false>, UnitFactors<true>, UNITS>;
using Q8_0 = BlockFormat<SignedBytes, UnitFactors<false>, UNITS>;
using Q2_K = BlockFormat<Pairs, ScaleMinimumBytes, 8>;
using Q3_K = BlockFormat<PairsBits, SignedScales, 8>;
using Q4_K = BlockFormat<Nibbles<false>, Heads, 8>;
using Q5_K = BlockFormat<NibblesBits<false>, Heads, 8>;
using Q6_K = BlockFormat<NibblesPairs, SignedScales, 8>;
