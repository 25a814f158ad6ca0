// What products of few rows have in common: x, and one step of some rows of w times it, in registers. Defines: TOKENS, ROWS,
// RAGGED (float types: columns are no multiple of a step).
#pragma once
#include "weights.cuh"

// x as the type of the weights wants it: int8 with a scale and scale * sum(codes) of 32 columns, or float32.
struct Input {
  const void* rows;
  const float *scales, *sums;
  int columns;
};

// Row `row` of x as it is for a type.
template <class T>
DEVICE Input input_of(const void* x, const float* scales, const float* sums, int columns, int row) {
  const long long start = static_cast<long long>(row) * columns;
  return {static_cast<const uint8_t*>(x) + start * (T::kWords ? 1 : 4), scales + start / 32, sums + start / 32, columns};
}

// One step of one row of x.
template <class T>
struct InputStep {
  int q[T::kWords];
  float scale, sum;
  int halves[2];

  DEVICE InputStep(const Input& x, int token, int step) {
    const int at = token * x.columns + step * T::kColumns;
    const uint4* codes = reinterpret_cast<const uint4*>(static_cast<const int8_t*>(x.rows) + at);
#pragma unroll
    for (int i = 0; i < T::kWords / 4; i++) {
      const uint4 v = codes[i];
#pragma unroll
      for (int j = 0; j < 4; j++) q[4 * i + j] = word_of(v, j);
    }
    scale = x.scales[at / 32];
    if constexpr (T::kHalves == 1 && T::kHasMinimum) sum = x.sums[at / 32];
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
    if constexpr (T::kWords == 8) dot += dot16(q + 4, x.q + 4);
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
  float w[ROWS][T::kColumns];
#pragma unroll
  for (int r = 0; r < ROWS; r++) T::decode(tiles[r], w[r]);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const int first = step * T::kColumns;
    const float* row = static_cast<const float*>(x.rows) + t * x.columns + first;
    float in[T::kColumns];
#pragma unroll
    for (int c = 0; c < T::kColumns; c += RAGGED ? 1 : 4) {
      if (RAGGED) in[c] = first + c < x.columns ? row[c] : 0.f;
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
