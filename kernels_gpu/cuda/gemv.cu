// out[t, n] = sum_k x[t, k] * w[n, k] + bias[n] + residual[t, n] for 1 to 8 rows of x: decoding. Bound by the memory's bandwidth
// for matrices above about 20 MB and by latency below, so everything here is about bytes in flight.
//
// A warp owns 32 / LANES * ROWS rows of w; LANES lanes go along a row together. Each lane has a ring of DEPTH * ROWS tiles in
// shared memory that cp.async fills; it reads only what it asked for itself, so the ring needs no barrier, and nothing waits
// between the end of some rows and the next that the warp takes: their tiles are on the way. SPLIT warps share the same rows
// and add their sums in a fixed order. The order of additions depends on LANES and SPLIT only, so a row of x gives the same numbers whatever
// comes with it.
//
// Up to three matrices that read the same x (q, k, v; gate, up) go in one launch; blocks are dealt out to them in order.
// With Launch.overlap the first tiles are asked for while the kernel before is still at work on x.
//
// With EXPERTS the matrices of some experts lie one above the other, and `gemv_experts` gives each slot of each row its own: what
// is read is known only once the kernel before has ended.
//
// Defines: TYPE0..2 (a struct of weights.cuh), SEGMENTS, TOKENS, ROWS, LANES, SPLIT, WARPS (a block), DEPTH, MIN_BLOCKS (on a
// multiprocessor: limits registers), COLUMNS, EXPERTS (how many; optional), NORM (gemv_source.cuh;
// optional).
#include "gemv_source.cuh"

constexpr int kWarpRows = 32 / LANES * ROWS;
constexpr int kBlockRows = WARPS / SPLIT * kWarpRows;
constexpr int kStride = LANES * SPLIT;  // steps between those of one lane
constexpr int kOutputs = kWarpRows * TOKENS;
constexpr int kOutputsOfLane = (kOutputs + 32 * SPLIT - 1) / (32 * SPLIT);
constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int kRingBytes = DEPTH * ROWS * 32 * max_of(TYPE0::kTileBytes, max_of(TYPE1::kTileBytes, TYPE2::kTileBytes));
static_assert(WARPS % SPLIT == 0 && (LANES & (LANES - 1)) == 0 && LANES <= 32, "whole groups of warps and lanes");

struct Segment {
  const void* w;
  float* out;         // [TOKENS, n]
  const float* bias;  // [n] or null
  int n, n_blocks;
  int above, total;  // rows of the memory at w before these n, and of all
};

// Asks for one round of tiles after the other, over all passes of a warp. What lies past the end of a row or of the matrix
// becomes zeros, so no lane ever goes another way.
template <class T>
struct Supply {
  typename T::Parts parts;
  uint8_t* ring;  // of the warp
  int n, above, first_step;  // of this lane
  int row, row_stride, step, slot;

  DEVICE uint8_t* tile(int slot, int r) const { return ring + (slot * ROWS + r) * 32 * T::kTileBytes; }

  DEVICE void ask() {
    typename T::Tile unused;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      T::visit(CopyTile(tile(slot, r), Rounds<T, kStride>::inside(step) && row + r < n), unused, parts, above + row + r, step);
    cp_async_commit();
    if (++slot == DEPTH) slot = 0;
    const bool ends = step == first_step + (Rounds<T, kStride>::kCount - 1) * kStride;
    row += ends ? row_stride : 0;
    step = ends ? first_step : step + kStride;
  }
};

template <class T>
DEVICE void multiply(const Segment& s, int block, const Source& source, const float* residual, uint8_t* ring,
                     float (*partial)[WARPS][kOutputs]) {
  const int warp = threadIdx.x / 32, lane = lane_id();
  const int share = warp % SPLIT, group = warp / SPLIT;
  const int row_stride = s.n_blocks * kBlockRows, block_row = block * kBlockRows;
  const int first_step = share * LANES + lane % LANES;
  const int lane_row = group * kWarpRows + lane / LANES * ROWS;
  Supply<T> supply{typename T::Parts(s.w, s.total, COLUMNS), ring + warp * kRingBytes, s.n, s.above, first_step,
                   block_row + lane_row, row_stride, first_step, 0};
#pragma unroll
  for (int d = 0; d < DEPTH; d++) supply.ask();
  const Input x = wait_for_rows(source);

  int buffer = 0;
  for (int first_row = block_row; first_row < s.n; first_row += row_stride) {
    const int group_row = first_row + group * kWarpRows;
    // what is added to the sums is there when they are done
    float extra[kOutputsOfLane];
#pragma unroll
    for (int i = 0; i < kOutputsOfLane; i++) {
      const int e = (i * SPLIT + share) * 32 + lane, row = group_row + e % kWarpRows;
      extra[i] = 0.f;
      if (e < kOutputs && row < s.n) {
        if (s.bias) extra[i] = s.bias[row];
        if (residual) extra[i] += residual[static_cast<long long>(e / kWarpRows) * s.n + row];
      }
    }
    float sums[TOKENS][ROWS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[t][r] = 0.f;

#pragma unroll 1
    for (int round = 0; round < Rounds<T, kStride>::kCount; round++) {
      const int step = Rounds<T, kStride>::nearest(first_step + round * kStride);
      typename T::Tile tiles[ROWS];
      cp_async_wait<DEPTH - 1>();
#pragma unroll
      for (int r = 0; r < ROWS; r++) T::visit(FetchTile(supply.tile(supply.slot, r)), tiles[r], supply.parts, 0, 0);
      supply.ask();  // into the place that was just read
      multiply_step<T>(tiles, x, step, sums);
    }

    float(*mine)[kOutputs] = partial[buffer];
    buffer ^= 1;  // the other warps may still read this one when the next sums come
    sum_over_lanes<LANES>(sums, [&](int t, int r, float v) { mine[warp][t * kWarpRows + lane / LANES * ROWS + r] = v; });
    if (SPLIT == 1) __syncwarp();
    else __syncthreads();
#pragma unroll
    for (int i = 0; i < kOutputsOfLane; i++) {
      const int e = (i * SPLIT + share) * 32 + lane, row = group_row + e % kWarpRows;
      if (e < kOutputs && row < s.n) {
        float v = mine[group * SPLIT][e];
#pragma unroll
        for (int w = 1; w < SPLIT; w++) v += mine[group * SPLIT + w][e];
        s.out[static_cast<long long>(e / kWarpRows) * s.n + row] = v + extra[i];
      }
    }
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// The matrix that this block works on, and with the type of it.
DEVICE void multiply_one(const Segment (&segments)[3], const Source& x, const float* residual, uint8_t* ring,
                         float (*partial)[WARPS][kOutputs]) {
  Segment s = segments[0];
  int block = blockIdx.x, which = 0;
  if (SEGMENTS > 1 && block >= s.n_blocks) {
    block -= s.n_blocks;
    s = segments[1];
    which = 1;
    if (SEGMENTS > 2 && block >= s.n_blocks) {
      block -= s.n_blocks;
      s = segments[2];
      which = 2;
    }
  }
  // one body for each type, not for each matrix
  if constexpr (SEGMENTS > 1 && !kSame<TYPE1, TYPE0>) {
    if (which == 1 || (which == 2 && kSame<TYPE2, TYPE1>)) return multiply<TYPE1>(s, block, x, residual, ring, partial);
  }
  if constexpr (SEGMENTS > 2 && !kSame<TYPE2, TYPE0> && !kSame<TYPE2, TYPE1>) {
    if (which == 2) return multiply<TYPE2>(s, block, x, residual, ring, partial);
  }
  multiply<TYPE0>(s, block, x, residual, ring, partial);
}

#ifndef EXPERTS
// x is int8 [TOKENS, COLUMNS] with scales and sums, or float [TOKENS, COLUMNS]; a missing matrix has no rows. Each
// matrix is worked on by so many blocks, which take kBlockRows rows in turns.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    gemv(const void* x, const float* x_scales, const float* x_sums, const float* residual,
         const void* w0, float* out0, const float* bias0, int n0, int blocks0,
         const void* w1, float* out1, const float* bias1, int n1, int blocks1,
         const void* w2, float* out2, const float* bias2, int n2, int blocks2,
         const float* norm_weight, float norm_eps) {
  __shared__ __align__(16) uint8_t ring[WARPS * kRingBytes];
  __shared__ float partial[2][WARPS][kOutputs];
  let_next_start();
  const Segment segments[3] = {
      {w0, out0, bias0, n0, blocks0, 0, n0}, {w1, out1, bias1, n1, blocks1, 0, n1}, {w2, out2, bias2, n2, blocks2, 0, n2}};
  multiply_one(segments, source_of(x, x_scales, x_sums, norm_weight, norm_eps), residual, ring, partial);
}
#else
// Grid (blocks of all matrices, slots): slot i of the step is multiplied with the matrix of expert experts[i]. x has a row for
// every x_slots of them (all of a token, or each one); `first` is the number of the grid's first slot. out [slots, n].
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    gemv_experts(const void* x, const float* x_scales, const float* x_sums, const int* experts, int first, int x_slots,
                 const void* w0, float* out0, int n0, int blocks0, const void* w1, float* out1, int n1,
                 int blocks1, const void* w2, float* out2, int n2, int blocks2) {
  __shared__ __align__(16) uint8_t ring[WARPS * kRingBytes];
  __shared__ float partial[2][WARPS][kOutputs];
  static_assert(TOKENS == 1, "a row of x for each slot");
  let_next_start();
  wait_for_previous();
  const int slot = first + blockIdx.y, expert = experts[slot];
  if (expert < 0) return;  // padding
  const long long to = slot;
  const Input in = input_of<TYPE0>(x, x_scales, x_sums, slot / x_slots);
  const Segment segments[3] = {{w0, out0 + to * n0, nullptr, n0, blocks0, expert * n0, EXPERTS * n0},
                               {w1, out1 + to * n1, nullptr, n1, blocks1, expert * n1, EXPERTS * n1},
                               {w2, out2 + to * n2, nullptr, n2, blocks2, expert * n2, EXPERTS * n2}};
  multiply_one(segments, {in}, nullptr, ring, partial);
}
#endif
