// Products of many rows with the matrices of their experts: out[slot, n] = scale * sum_k x[slot's row, k] * w[expert of slot, n, k].
// Tiles of slots of one expert come from `sort_slots` (as the blocks of vLLM's fused MoE): a block gathers their rows of x and
// multiplies them with WARPS * 16 * MT rows of that expert's matrix, all columns of it (mma_tile.cuh). How many tiles there are is
// known on the device only: the grid has room for all that there can be, and what is too many ends at once.
// Bound by reading each expert's matrix once for each of its tiles; neighbouring blocks share it in the L2.
//
// Defines: those of mma_tile.cuh, and BLOCKS_PER_SM, which bounds the registers.
#include "mma_loop.cuh"

static_assert(BM <= kThreads, "a thread a row");

struct Matrices {
  const uint8_t* w;  // [n_experts * n] rows as weights_layout.py has them
  float* out;        // [slots, n]
  int n;
};

// x: float16 rows, of the token with x_slots = n_used (slots of a token share one), of the slot with 1. scale: of the token, or
// null. Up to three matrices of the same experts; those that are not there have no rows. Grid (tiles of slots, tiles of n).
extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    expert_mma(const half* x, const float* scale, const int* expert_of_tile, const int* slot_of_row, int n_used, int x_slots,
               int columns, int n_experts, const uint8_t* w0, float* out0, int n0, const uint8_t* w1, float* out1, int n1,
               const uint8_t* w2, float* out2, int n2) {
  __shared__ int slots[BM];
  DYNAMIC_SHARED(uint8_t, shared);
  let_next_start();
  wait_for_previous();
  const int expert = expert_of_tile[blockIdx.x];
  if (expert < 0) return;
  if (threadIdx.x < BM) slots[threadIdx.x] = slot_of_row[blockIdx.x * BM + threadIdx.x];
  __syncthreads();
  Matrices s = {w0, out0, n0};
  int tile = blockIdx.y;
  if (tile >= ceil_div(n0, kTileN)) {
    tile -= ceil_div(n0, kTileN);
    s = {w1, out1, n1};
    if (tile >= ceil_div(n1, kTileN)) {
      tile -= ceil_div(n1, kTileN);
      s = {w2, out2, n2};
    }
  }
  const int first = tile * kTileN, n_chunks = ceil_div(columns, kColumns);

  // rows behind the expert's are the next one's, or the last repeated: what they give is never written
  int asked = 0, chunk = 0, start = 0;  // chunks that were asked for and that were multiplied; column of the next stage of x
  float sums[MT][kGroups][4] = {};
  multiply_chunks(
      sums, shared, n_chunks, chunk,
      [&](uint8_t* to) {
        Format::stage<kTileN, kThreads>(s.w, to, expert * s.n + first, n_experts * s.n, asked++, columns);
      },
      [&](uint8_t* to, int) {
        constexpr int kPieces = KX / 8, kTotal = BM * kPieces;
#pragma unroll
        for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; i++) {
          const int piece = threadIdx.x + i * kThreads;
          if (kTotal % kThreads && piece >= kTotal) break;
          const int row = piece / kPieces, column = piece % kPieces * 8, from = slots[row];
          const bool there = from >= 0 && start + column < columns;
          const half* source = there ? x + static_cast<long long>(from / x_slots) * columns + start + column : x;
          cp_async16(to + x_at(row, column), source, there);
        }
        start += KX;
      },
      [&](bool) { chunk++; });

  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kGroups; j++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int slot = slots[j * 8 + 2 * t + e];
      if (slot < 0) continue;
      const float factor = (scale ? scale[slot / n_used] : 1.0f) * (1.0f / Format::kGain);
#pragma unroll
      for (int i = 0; i < MT * 2; i++) {
        const int n = first + ((threadIdx.x >> 5) * MT + i / 2) * 16 + i % 2 * 8 + g;
        if (n < s.n) s.out[static_cast<long long>(slot) * s.n + n] = sums[i / 2][j][i % 2 * 2 + e] * factor;
      }
    }
  }
}
