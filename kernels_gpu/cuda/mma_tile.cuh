// A tile of a product on the tensor cores: weights in their blocks and x as float16 in rings of shared memory, float32 sums in
// registers. Weights are operand a of mma, 16 rows of them to 8 activation rows, and are decoded straight into its registers: a
// sum does not care about the order of its columns, so lane t of four takes columns 8t..8t+7 of each 32 as its share of two
// products of depth 16, and reads x in the same order, 16 bytes at a time. Each weight is decoded once for BM rows.
//
// Defines: TYPE (mma_weights.cuh), UNITS (of a chunk; not for F16 and BF16), BM, MT, WARPS, KX (columns of x a stage), W_STAGES,
// X_STAGES.
#pragma once
#include "mma_weights.cuh"

using Format = TYPE;
constexpr int kThreads = WARPS * 32;
constexpr int kTileN = WARPS * 16 * MT;
constexpr int kColumns = Format::kColumns;  // of a chunk
constexpr int kSteps = kColumns / KX;       // stages of x a chunk
constexpr int kGroups = BM / 8;
constexpr int kXRow = KX * 2;  // bytes
constexpr int kXStage = BM * kXRow;
constexpr int kWStage = kTileN * Format::kRowBytes;
constexpr int kFragments = MT * kGroups;
static_assert(BM % 8 == 0 && KX % 64 == 0 && kColumns % KX == 0, "tiles are whole");
static_assert(W_STAGES > 1 && X_STAGES > 1 && X_STAGES - 1 <= (W_STAGES - 1) * kSteps, "a chunk must be asked for before its x");

// Byte of a column of x in a stage: the 32 bytes that four lanes read of each of four rows lie in different banks.
DEVICE int x_at(int row, int column) { return row * kXRow + (column / 8 ^ (row & 3) << 1) * 16 + column % 8 * 2; }

// Four columns from `column` + 4t, a constant multiple of 16, of row `first` + g: what depends on the lane is one number.
DEVICE uint2 load_x(const uint8_t* x, int first, int g, int t, int column) {
  return *reinterpret_cast<const uint2*>(x + first * kXRow + (x_at(g, 4 * t) ^ column * 2));
}

DEVICE void multiply(float (&sums)[MT][kGroups][4], const uint8_t* w, const uint8_t* x, int chunk, int step) {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3, warp = threadIdx.x >> 5;
#pragma unroll
  for (int pair = 0; pair < KX / 64; pair++) {
    uint32_t h[MT][2][2][4];  // [16 rows][row g or g + 8][32 columns][columns 8t + 2i and the next]
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        Format::decode<kTileN>(w, (warp * MT + m) * 16 + r * 8, g, t, chunk, step * (KX / 64) + pair, h[m][r]);
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const int column = pair * 64 + s * 32;
      #pragma unroll
      for (int j = 0; j < kGroups; j++) {
        const uint2 low = load_x(x, j * 8, g, t, column), high = load_x(x, j * 8, g, t, column + 16);
        const uint32_t b0[2] = {low.x, low.y}, b1[2] = {high.x, high.y};
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const uint32_t a0[4] = {h[m][0][s][0], h[m][1][s][0], h[m][0][s][1], h[m][1][s][1]};
          const uint32_t a1[4] = {h[m][0][s][2], h[m][1][s][2], h[m][0][s][3], h[m][1][s][3]};
          mma_f16(sums[m][j], a0, b0);
          mma_f16(sums[m][j], a1, b1);
        }
      }
    }
  }
}
