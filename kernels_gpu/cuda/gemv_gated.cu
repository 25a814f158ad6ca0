// out[t, n] = activation(x[t] * gate[n]) * (x[t] * up[n]) for 1 to 8 rows of x, as what the next product reads: the first half of
// a gated feed-forward layer in decode. Tiles come as in gemv.cu, and sums are added in the same order.
//
// A block makes 32 columns of out, one block of "a8": WARPS * 32 / LANES * ROWS / 2 of them at a time, ROWS / 2 rows of each
// matrix a lane.
//
// Defines: TYPE (of both matrices), ACTIVATION, OUT (OUT_F32, OUT_A8), TOKENS, ROWS, LANES, WARPS, DEPTH, MIN_BLOCKS, RAGGED.
#include "activation.cuh"
#include "gemv_step.cuh"
#include "row_output.cuh"

constexpr int kPairs = ROWS / 2;  // of a lane
constexpr int kWarpPairs = 32 / LANES * kPairs;
constexpr int kPassPairs = WARPS * kWarpPairs;
constexpr int kColumns = 32;  // of a block
static_assert(ROWS % 2 == 0 && kColumns % kPassPairs == 0, "whole passes");

// Asks for one round of tiles after the other, over all passes of a warp; those of `up` behind those of `gate`.
struct Supply {
  TYPE::Parts gate, up;
  uint8_t* ring;  // of the warp
  int steps, first_step, last_step, row, rows_end;
  int step, slot;

  DEVICE uint8_t* tile(int r) const { return ring + (slot * ROWS + r) * 32 * TYPE::kTileBytes; }

  DEVICE void ask() {
    TYPE::Tile unused;
    const bool valid = step < steps && row < rows_end;
#pragma unroll
    for (int r = 0; r < kPairs; r++) {
      TYPE::visit(CopyTile(tile(r), valid), unused, gate, row + r, step);
      TYPE::visit(CopyTile(tile(kPairs + r), valid), unused, up, row + r, step);
    }
    cp_async_commit();
    if (++slot == DEPTH) slot = 0;
    const bool ends = step == last_step;
    row += ends ? kPassPairs : 0;
    step = ends ? first_step : step + LANES;
  }
};

// x as in gemv.cu; gate and up [n, columns], n a multiple of 32; out [TOKENS, n]. One block for each 32 columns of out.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    gemv_gated(const void* x, const float* x_scales, const float* x_sums, int columns, const void* gate, const void* up, int n,
               void* out, float* out_scales, float* out_sums) {
  __shared__ __align__(16) uint8_t ring[WARPS * DEPTH * ROWS * 32 * TYPE::kTileBytes];
  __shared__ float values[TOKENS][kColumns];
  let_next_start();
  const Input in{x, x_scales, x_sums, columns};
  const int warp = threadIdx.x / 32, lane = lane_id(), first_column = blockIdx.x * kColumns;
  const int steps = ceil_div(columns, TYPE::kColumns), rounds = ceil_div(steps, LANES), first_step = lane % LANES;
  const int place = warp * kWarpPairs + lane / LANES * kPairs;  // of this lane's first pair in a pass
  Supply supply{TYPE::Parts(gate, n, columns), TYPE::Parts(up, n, columns), ring + warp * DEPTH * ROWS * 32 * TYPE::kTileBytes,
                steps, first_step, first_step + (rounds - 1) * LANES, first_column + place, first_column + kColumns,
                first_step, 0};
#pragma unroll
  for (int d = 0; d < DEPTH; d++) supply.ask();
  wait_for_previous();

  for (int column = 0; column < kColumns; column += kPassPairs) {
    float sums[TOKENS][ROWS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[t][r] = 0.f;
    for (int round = 0; round < rounds; round++) {
      const int step = min(first_step + round * LANES, steps - 1);  // a tile of zeros may meet any x
      TYPE::Tile tiles[ROWS];
      cp_async_wait<DEPTH - 1>();
#pragma unroll
      for (int r = 0; r < ROWS; r++) TYPE::visit(FetchTile(supply.tile(r)), tiles[r], supply.gate, 0, 0);
      supply.ask();  // into the place that was just read
      multiply_step<TYPE>(tiles, in, step, sums);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) sums[t][r] += __shfl_xor_sync(FULL_WARP, sums[t][r], o);
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (lane % LANES == 0) values[t][column + place + r] = activated(sums[t][r]) * sums[t][kPairs + r];
    }
  }

  __syncthreads();
#pragma unroll
  for (int first = 0; first < TOKENS; first += WARPS) {
    const int t = first + warp;
    if (t >= TOKENS) break;  // whole warps
    const float v = values[t][lane];
    const long long at = static_cast<long long>(t) * n + first_column;
#if OUT == OUT_A8
    const A8Block block = a8_block(warp_max(fabsf(v)));
    const int code = __float2int_rn(v * block.inverse), sum = warp_sum(code);
    static_cast<int8_t*>(out)[at + lane] = static_cast<int8_t>(code);
    if (lane == 0) {
      out_scales[at / 32] = block.scale;
      out_sums[at / 32] = block.scale * static_cast<float>(sum);
    }
#else
    static_cast<float*>(out)[at + lane] = v;
#endif
  }
}
