// out[t, n] = activation(x[t] * gate[n]) * (x[t] * up[n]) for 1 to 8 rows of x, as what the next product reads: the first half of
// a gated feed-forward layer in decode. Tiles come as in gemv.cu, and sums are added in the same order.
//
// A block makes 32 columns of out, one block of "a8": WARPS * 32 / LANES * ROWS / 2 of them at a time, ROWS / 2 rows of each
// matrix a lane.
//
// With EXPERTS the matrices of some experts lie one above the other, and `gemv_gated_experts` gives each slot of each row its own.
//
// Defines: TYPE (of both matrices), ACTIVATION, OUT (OUT_F32, OUT_A8), TOKENS, ROWS, LANES, WARPS, DEPTH, MIN_BLOCKS, COLUMNS,
// EXPERTS (how many; optional), NORM (gemv_source.cuh; optional).
#include "activation.cuh"
#include "gemv_source.cuh"
#include "row_output.cuh"

constexpr int kPairs = ROWS / 2;  // of a lane
constexpr int kWarpPairs = 32 / LANES * kPairs;
constexpr int kPassPairs = WARPS * kWarpPairs;
constexpr int kColumns = 32;  // of a block
using Steps = Rounds<TYPE, LANES>;
static_assert(ROWS % 2 == 0 && kColumns % kPassPairs == 0, "whole passes");

// Asks for one round of tiles after the other, over all passes of a warp; those of `up` behind those of `gate`.
struct Supply {
  TYPE::Parts gate, up;
  uint8_t* ring;  // of the warp
  int first_step, row, rows_end;
  int above;  // rows of the memory above the matrix
  int step, slot;

  DEVICE uint8_t* tile(int r) const { return ring + (slot * ROWS + r) * 32 * TYPE::kTileBytes; }

  DEVICE void ask() {
    TYPE::Tile unused;
    const bool valid = Steps::inside(step) && row < rows_end;
#pragma unroll
    for (int r = 0; r < kPairs; r++) {
      TYPE::visit(CopyTile(tile(r), valid), unused, gate, above + row + r, step);
      TYPE::visit(CopyTile(tile(kPairs + r), valid), unused, up, above + row + r, step);
    }
    cp_async_commit();
    if (++slot == DEPTH) slot = 0;
    const bool ends = step == first_step + (Steps::kCount - 1) * LANES;
    row += ends ? kPassPairs : 0;
    step = ends ? first_step : step + LANES;
  }
};

// Rows first_row.. of out [., n], a block's 32 columns; gate and up are n rows of `total` in memory, behind those `above`.
DEVICE void make_columns(const Source& source, const void* gate, const void* up, int n, int above, int total, int first_row,
                         void* out, float* out_scales, float* out_sums) {
  __shared__ __align__(16) uint8_t ring[WARPS * DEPTH * ROWS * 32 * TYPE::kTileBytes];
  __shared__ float values[TOKENS][2][kColumns + 2];  // gate, up; what a warp stores lies in different banks
  const int warp = threadIdx.x / 32, lane = lane_id(), first_column = blockIdx.x * kColumns;
  const int first_step = lane % LANES;
  const int place = warp * kWarpPairs + lane / LANES * kPairs;  // of this lane's first pair in a pass
  Supply supply{TYPE::Parts(gate, total, COLUMNS), TYPE::Parts(up, total, COLUMNS),
                ring + warp * DEPTH * ROWS * 32 * TYPE::kTileBytes, first_step, first_column + place,
                first_column + kColumns, above, first_step, 0};
#pragma unroll
  for (int d = 0; d < DEPTH; d++) supply.ask();
  const Input in = wait_for_rows(source);

  for (int column = 0; column < kColumns; column += kPassPairs) {
    float sums[TOKENS][ROWS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[t][r] = 0.f;
#pragma unroll 1
    for (int round = 0; round < Steps::kCount; round++) {
      const int step = Steps::nearest(first_step + round * LANES);
      TYPE::Tile tiles[ROWS];
      cp_async_wait<DEPTH - 1>();
#pragma unroll
      for (int r = 0; r < ROWS; r++) TYPE::visit(FetchTile(supply.tile(r)), tiles[r], supply.gate, 0, 0);
      supply.ask();  // into the place that was just read
      multiply_step<TYPE>(tiles, in, step, sums);
    }
    sum_over_lanes<LANES>(sums, [&](int t, int r, float v) { values[t][r / kPairs][column + place + r % kPairs] = v; });
  }

  __syncthreads();
#pragma unroll
  for (int first = 0; first < TOKENS; first += WARPS) {
    const int t = first + warp;
    if (t >= TOKENS) break;  // whole warps
    const float v = activated(values[t][0][lane]) * values[t][1][lane];
    const long long at = static_cast<long long>(first_row + t) * n + first_column;
#if OUT == OUT_A8
    const A8Block block = a8_block(warp_max(fabsf(v)));
    const int code = __float2int_rn(v * block.inverse), sum = warp_sum(code);
    static_cast<int8_t*>(out)[a8_place(at + lane)] = static_cast<int8_t>(code);
    if (lane == 0) {
      out_scales[at / 32] = block.scale;
      out_sums[at / 32] = block.scale * static_cast<float>(sum);
    }
#else
    static_cast<float*>(out)[at + lane] = v;
#endif
  }
}

#ifndef EXPERTS
// x as in gemv.cu; gate and up [n, COLUMNS], n a multiple of 32; out [TOKENS, n]. One block for each 32 columns of out.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    gemv_gated(const void* x, const float* x_scales, const float* x_sums, const void* gate, const void* up, int n, void* out,
               float* out_scales, float* out_sums, const float* norm_weight, float norm_eps) {
  let_next_start();
  const Source source = source_of(x, x_scales, x_sums, norm_weight, norm_eps);
  make_columns(source, gate, up, n, 0, n, 0, out, out_scales, out_sums);
}
#else
// The same for slots, as in `gemv_experts`: out [slots, n]. Grid (blocks of 32 columns, slots).
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    gemv_gated_experts(const void* x, const float* x_scales, const float* x_sums, const int* experts, int x_slots,
                       const void* gate, const void* up, int n, void* out, float* out_scales, float* out_sums) {
  static_assert(TOKENS == 1, "a row of x for each slot");
  let_next_start();
  wait_for_previous();
  const int slot = blockIdx.y, expert = experts[slot];
  if (expert < 0) return;  // padding
  const Input in = input_of<TYPE>(x, x_scales, x_sums, slot / x_slots);
  make_columns({in}, gate, up, n, expert * n, EXPERTS * n, slot, out, out_scales, out_sums);
}
#endif
