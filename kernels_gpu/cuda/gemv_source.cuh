// Where a product's rows of x come from: the kernel before, or, with NORM, one row of float32 that each block normalizes and
// rounds for itself, in shared memory, with the numbers of rows.cu. That is less than what passes between two kernels.
// Defines: those of gemv_step.cuh; NORM (optional; then COLUMNS is a multiple of 32, at most 1,024 * WARPS and 4,096), WARPS.
#pragma once
#include "gemv_step.cuh"
#ifndef NORM

struct Source {
  Input x;
};

DEVICE Input wait_for_rows(const Source& source) {
  wait_for_previous();
  return source.x;
}

DEVICE Source source_of(const void* x, const float* scales, const float* sums, const float*, float) { return {{x, scales, sums}}; }

#else
#include "row_output.cuh"

struct NormedRow {
  __align__(16) int8_t codes[(COLUMNS + 255) / 256 * 256];
  float scales[COLUMNS / 32], sums[COLUMNS / 32], squares[32];
};

// The row of rms_norm's block of 1,024 threads by the warps of this one in turns, four columns a lane. What lanes have to tell
// one another is folded: lane l of eight then works on the l-th turn's block of 32.
struct Source {
  static constexpr int kChunks = COLUMNS / 4, kRowWarps = (COLUMNS + 127) / 128, kTurns = (kRowWarps + WARPS - 1) / WARPS;
  static_assert(kTurns <= 8 && kRowWarps <= 32 && WARPS % 2 == 0, "a turn for each of eight lanes");
  const float *x, *norm;
  float eps;
  NormedRow* row;

  static DEVICE int chunk(int turn) { return turn * 32 * WARPS + static_cast<int>(threadIdx.x); }

  static DEVICE void load(const float* from, float4 (&v)[kTurns]) {
#pragma unroll
    for (int i = 0; i < kTurns; i++)
      v[i] = chunk(i) < kChunks ? reinterpret_cast<const float4*>(from)[chunk(i)] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  // 1 / the root of the mean square.
  DEVICE float factor(const float4 (&v)[kTurns]) const {
    float squares[8] = {};
#pragma unroll
    for (int i = 0; i < kTurns; i++) squares[i] = squares_of(v[i]);
    int index = 0, count = 8;
    Fold<8, 16, 8>::run(squares, index, count);
    const int warp = index * WARPS + (threadIdx.x >> 5);
    if (count && warp < kRowWarps) row->squares[warp] = squares[0];
    __syncthreads();
    return 1.0f / sqrtf(warp_sum(lane_id() < kRowWarps ? row->squares[lane_id()] : 0.0f) / COLUMNS + eps);
  }

  DEVICE void round(float4 (&v)[kTurns], const float4 (&weight)[kTurns]) const {
    const float scale = factor(v);
    float amax[8] = {}, sums[8] = {};
#pragma unroll
    for (int i = 0; i < kTurns; i++) amax[i] = largest(v[i] = scaled(v[i], scale, weight[i]));
    int turn = 0, count = 8;
    Fold<8, 4, 8, Largest>::run(amax, turn, count);
    const A8Block block = a8_block(amax[0]);
    const int place = a8_place(4 * chunk(0));
#pragma unroll
    for (int i = 0; i < kTurns; i++) {
      const float inverse = __shfl_sync(FULL_WARP, block.inverse, (lane_id() & 24) + i);
      const int a = __float2int_rn(v[i].x * inverse), b = __float2int_rn(v[i].y * inverse);
      const int c = __float2int_rn(v[i].z * inverse), d = __float2int_rn(v[i].w * inverse);
      sums[i] = static_cast<float>(a + b + c + d);
      const int word = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
      if (chunk(i) < kChunks) *reinterpret_cast<int*>(row->codes + place + i * 128 * WARPS) = word;
    }
    turn = 0, count = 8;
    Fold<8, 4, 8>::run(sums, turn, count);
    if (turn < kTurns && chunk(turn) < kChunks) {
      row->scales[chunk(turn) / 8] = block.scale;
      row->sums[chunk(turn) / 8] = block.scale * sums[0];
    }
    __syncthreads();
  }
};

// All threads of the block take part.
DEVICE Input wait_for_rows(const Source& source) {
  float4 v[Source::kTurns], weight[Source::kTurns];
  Source::load(source.norm, weight);
  wait_for_previous();
  Source::load(source.x, v);
  source.round(v, weight);
  return {source.row->codes, source.row->scales, source.row->sums};
}

DEVICE Source source_of(const void* x, const float*, const float*, const float* weight, float eps) {
  __shared__ NormedRow row;
  return {static_cast<const float*>(x), weight, eps, &row};
}
#endif
