// What products of few rows have in common: x, and one step of some rows of w times it, in registers. Defines: TOKENS, ROWS,
// COLUMNS (of x and w: as a constant it spares a tenth of all instructions, those that find the rows of x).
#pragma once
#include "a8.cuh"
#include "fold.cuh"
#include "weights.cuh"

// x as the type of the weights wants it: int8 (a8.cuh) with a scale and scale * sum(codes) of 32 columns, or float32.
struct Input {
  const void* rows;
  const float *scales, *sums;
  int first = 0;  // row of the memory, of int8
};

// Row `row` of x as it is for a type.
template <class T>
DEVICE Input input_of(const void* x, const float* scales, const float* sums, int row) {
  if (T::kWords) return {x, scales, sums, row};
  return {static_cast<const float*>(x) + static_cast<long long>(row) * COLUMNS, scales, sums, 0};
}

// How a row is gone through by kStride lanes.
template <class T, int kStride>
struct Rounds {
  static constexpr int kSteps = (COLUMNS + T::kColumns - 1) / T::kColumns, kCount = (kSteps + kStride - 1) / kStride;
  static constexpr bool kWhole = kSteps % kStride == 0;  // no lane is ever behind the end
  static DEVICE bool inside(int step) { return kWhole || step < kSteps; }
  // A step that exists: a tile of zeros may meet any x.
  static DEVICE int nearest(int step) { return kWhole ? step : min(step, kSteps - 1); }
};

// One step of one row of x.
template <class T>
struct InputStep {
  int q[T::kWords];
  float scale, sum;
  int halves[2];

  DEVICE InputStep(const Input& x, int token, int step) {
    // with rows of whole blocks the place in a row is one for all tokens
    // with rows of whole blocks all rows' codes are a constant apart
    constexpr bool kWhole = COLUMNS % 256 == 0;
    const int row = token * COLUMNS, first = x.first * COLUMNS, column = step * T::kColumns;
    const uint32_t place = kWhole ? first + a8_place(column) : a8_place(first + row + column);
#pragma unroll
    for (int i = 0; i < T::kWords / 4; i++) {
      const int8_t* codes = static_cast<const int8_t*>(x.rows) + (place ^ (i ? kA8Half : 0));
      const uint4 v = *reinterpret_cast<const uint4*>(codes + (kWhole ? row : 0));
#pragma unroll
      for (int j = 0; j < 4; j++) q[4 * i + j] = word_of(v, j);
    }
    const int unit = (first + column) / 32;
    scale = (x.scales + unit)[row / 32];
    if constexpr (T::kHalves == 1 && T::kHasMinimum) sum = (x.sums + unit)[row / 32];
    if constexpr (T::kHalves == 2 && T::kHasMinimum) {
      const int ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
      halves[0] = dot16(q, ones);
      halves[1] = dot16(q + 4, ones);
    }
  }
};

template <class T>
DEVICE void add_product(float& sum, const int* q, const Factors& f, const InputStep<T>& x) {
  if constexpr (T::kHalves == 1) {
    int dot = dot16(q, x.q);
    if constexpr (T::kWords == 8) dot = dot16(q + 4, x.q + 4, dot);
    sum = fmaf(x.scale * (f.d * f.scale[0]), static_cast<float>(dot), sum);
    if constexpr (T::kHasMinimum) sum = fmaf(f.low * f.minimum[0], x.sum, sum);
  } else {
    const float dot = f.scale[0] * dot16(q, x.q) + f.scale[1] * dot16(q + 4, x.q + 4);
    if constexpr (T::kHasMinimum) {
      const float low = f.low * (f.minimum[0] * x.halves[0] + f.minimum[1] * x.halves[1]);
      sum = fmaf(x.scale, fmaf(f.d, dot, low), sum);
    } else {
      sum = fmaf(x.scale * f.d, dot, sum);
    }
  }
}

template <class T>
DEVICE void multiply_int8(const typename T::Tile* tiles, const Input& x, int step, float (*sums)[ROWS]) {
  int q[ROWS][T::kWords];
  Factors f[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    T::unpack(tiles[r], q[r]);
    f[r] = T::factors(tiles[r], step);
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const InputStep<T> in(x, t, step);
#pragma unroll
    for (int r = 0; r < ROWS; r++) add_product<T>(sums[t][r], q[r], f[r], in);
  }
}

template <class T>
DEVICE void multiply_float(const typename T::Tile* tiles, const Input& x, int step, float (*sums)[ROWS]) {
  constexpr bool kRagged = COLUMNS % T::kColumns != 0;
  float w[ROWS][T::kColumns];
#pragma unroll
  for (int r = 0; r < ROWS; r++) T::decode(tiles[r], w[r]);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const int first = step * T::kColumns;
    const float* row = static_cast<const float*>(x.rows) + t * COLUMNS + first;
    float in[T::kColumns];
#pragma unroll
    for (int c = 0; c < T::kColumns; c += kRagged ? 1 : 4) {
      if (kRagged) in[c] = first + c < COLUMNS ? row[c] : 0.f;
      else *reinterpret_cast<float4*>(in + c) = *reinterpret_cast<const float4*>(row + c);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < T::kColumns; c++) sums[t][r] = fmaf(w[r][c], in[c], sums[t][r]);
  }
}

template <class T>
DEVICE void multiply_step(const typename T::Tile* tiles, const Input& x, int step, float (*sums)[ROWS]) {
  if constexpr (T::kWords == 0) multiply_float<T>(tiles, x, step, sums);
  else multiply_int8<T>(tiles, x, step, sums);
}

// Sums over kLanes neighbouring lanes; store(token, row, sum) is called by one lane for each. Every sum adds in the same order,
// however many there are.
template <int kLanes, class Store>
DEVICE void sum_over_lanes(const float (&sums)[TOKENS][ROWS], Store store) {
  constexpr int kSums = TOKENS * ROWS;
  float values[kSums];
#pragma unroll
  for (int i = 0; i < kSums; i++) values[i] = sums[i / ROWS][i % ROWS];
  int index = 0, count = kSums;
  Fold<kSums, kLanes / 2, kSums>::run(values, index, count);
#pragma unroll
  for (int i = 0; i < Folded<kSums, kLanes>::kValue; i++)
    if (i < count) store((index + i) / ROWS, (index + i) % ROWS, values[i]);
}
