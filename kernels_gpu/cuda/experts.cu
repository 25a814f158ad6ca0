// A mixture of experts, all but the products: which experts a row goes to, its slots in order of experts, and their weighted sum.
// Bound by latency: a step has a few kilobytes of it. What says whom to ask never leaves the device.
//
// Defines of a kernel stand with it.
#include "ptx.cuh"

#ifdef N_USED
// Softmax (or sigmoid) of a row's N_EXPERTS logits, the N_USED largest in falling order, of equal ones the lower number first, and
// what they weigh: a warp a row. NaN is never chosen before a number. Rows of padding, those where `present` is negative, choose
// no expert: -1, which weighs 0. Defines: N_EXPERTS, N_USED, SIGMOID, NORMALIZE, WARPS.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    route_experts(const float* logits, const int* present, int n_rows, float scale, int* experts, float* weights) {
  constexpr int kMine = (N_EXPERTS + 31) / 32;
  constexpr float kTaken = -2.0f, kSmallestSum = 6.103515625e-05f;  // 2^-14
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = lane_id();
  if (row >= n_rows) return;
  if (present[row] < 0) {
    for (int slot = lane; slot < N_USED; slot += 32) {
      const long long at = static_cast<long long>(row) * N_USED + slot;
      if (experts) experts[at] = -1;
      weights[at] = 0.0f;
    }
    return;
  }
  const float* source = logits + static_cast<long long>(row) * N_EXPERTS;
  float score[kMine], largest = -3.0e38f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMine; i++) {
    const int expert = lane + 32 * i;
    score[i] = expert < N_EXPERTS ? source[expert] : -3.0e38f;
    largest = fmaxf(largest, score[i]);
  }
  if (!SIGMOID) largest = warp_max(largest);
#pragma unroll
  for (int i = 0; i < kMine; i++) {
    const bool there = lane + 32 * i < N_EXPERTS;
    score[i] = !there ? kTaken : SIGMOID ? 1.0f / (1.0f + expf(-score[i])) : expf(score[i] - largest);
    sum += there ? score[i] : 0.0f;
  }
  if (!SIGMOID) sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kMine; i++) {
    if (lane + 32 * i < N_EXPERTS && !SIGMOID) score[i] /= sum;
    if (score[i] != score[i]) score[i] = -1.0f;
  }
  float chosen = 0.0f, total = 0.0f;  // lane s keeps slot s, in turns of 32
  constexpr int kTurns = (N_USED + 31) / 32;
  float kept[kTurns];
  int numbers[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) kept[turn] = 0.0f, numbers[turn] = 0;
  for (int slot = 0; slot < N_USED; slot++) {
    float best = kTaken;
    int number = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < kMine; i++)
      if (score[i] > best) best = score[i], number = lane + 32 * i;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      const float other = __shfl_xor_sync(FULL_WARP, best, o);
      const int its = __shfl_xor_sync(FULL_WARP, number, o);
      if (other > best || (other == best && its < number)) best = other, number = its;
    }
#pragma unroll
    for (int i = 0; i < kMine; i++)
      if (number == lane + 32 * i) score[i] = kTaken;
    chosen = fmaxf(best, 0.0f);
    total += chosen;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
      if (slot == lane + 32 * turn) kept[turn] = chosen, numbers[turn] = number;
  }
  const float whole = NORMALIZE ? fmaxf(total, kSmallestSum) : 1.0f;
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const int slot = lane + 32 * turn;
    if (slot >= N_USED) continue;
    const long long at = static_cast<long long>(row) * N_USED + slot;
    if (experts) experts[at] = numbers[turn];
    weights[at] = kept[turn] / whole * scale;
  }
}

// out[row] = residual[row] + the sum over the slots, in ascending order, of weights[row][slot] * x[row][slot]. What weighs 0 is not
// read: of rows of padding nobody wrote it. Grid (blocks along a row, rows), a thread four of WIDTH columns; `residual` may be
// null, or out. Defines: N_USED, WIDTH, THREADS.
#ifdef WIDTH
extern "C" __global__ void __launch_bounds__(THREADS)
    combine_experts(const float* x, const float* weights, const float* residual, float* out) {
  let_next_start();
  wait_for_previous();
  const int chunk = blockIdx.x * THREADS + threadIdx.x;
  if (chunk >= WIDTH / 4) return;
  const long long row = blockIdx.y;
  const float4* slots = reinterpret_cast<const float4*>(x) + row * N_USED * (WIDTH / 4) + chunk;
  float4 sum = residual ? reinterpret_cast<const float4*>(residual)[row * (WIDTH / 4) + chunk] : make_float4(0, 0, 0, 0);
#pragma unroll
  for (int s = 0; s < N_USED; s++) {
    const float weight = weights[row * N_USED + s];
    if (weight == 0.0f) continue;
    const float4 v = slots[s * (WIDTH / 4)];
    sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
  }
  reinterpret_cast<float4*>(out)[row * (WIDTH / 4) + chunk] = sum;
}
#endif
#endif

#ifdef TILE_ROWS
// The slots of a step by their experts, in tiles of TILE_ROWS that hold slots of one expert: slot_of_row[tile * TILE_ROWS + i], -1
// where a tile is not full, and expert_of_tile, -1 for tiles that are not needed. One block: a step has up to some ten thousand
// slots, in the L2. Slots of no expert (-1) are in no tile. Within an expert slots are in any order; no result depends on it.
// Defines: N_EXPERTS, TILE_ROWS, THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    sort_slots(const int* experts, int n_slots, int n_tiles, int* expert_of_tile, int* slot_of_row) {
  __shared__ int counts[N_EXPERTS], next[N_EXPERTS];
  let_next_start();
  wait_for_previous();
  for (int e = threadIdx.x; e < N_EXPERTS; e += THREADS) counts[e] = 0;
  __syncthreads();
  for (int slot = threadIdx.x; slot < n_slots; slot += THREADS)
    if (experts[slot] >= 0) atomicAdd(&counts[experts[slot]], 1);
  for (int row = threadIdx.x; row < n_tiles * TILE_ROWS; row += THREADS) slot_of_row[row] = -1;
  for (int tile = threadIdx.x; tile < n_tiles; tile += THREADS) expert_of_tile[tile] = -1;
  __syncthreads();
  for (int e = threadIdx.x; e < N_EXPERTS; e += THREADS) {
    int first = 0;
    for (int before = 0; before < e; before++) first += ceil_div(counts[before], TILE_ROWS);
    next[e] = first * TILE_ROWS;
    for (int tile = 0; tile < ceil_div(counts[e], TILE_ROWS); tile++) expert_of_tile[first + tile] = e;
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < n_slots; slot += THREADS)
    if (experts[slot] >= 0) slot_of_row[atomicAdd(&next[experts[slot]], 1)] = slot;
}
#endif
