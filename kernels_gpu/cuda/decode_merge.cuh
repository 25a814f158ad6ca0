// What a block of attention_decode.cu shares, and how its results and those of all splits are brought together and written.
// Defines: those of attention_decode.cu.
#pragma once
#include "fold.cuh"
#include "kv.cuh"
#include "row_output.cuh"

constexpr int kLanes = PowerOfTwo<HEAD / 8>::kValue;        // lanes of a vector; those past HEAD idle
constexpr int kAtOnce = 32 / kLanes;                  // positions of one load of a warp
constexpr int kTile = UNROLL * kAtOnce;               // positions of a warp's turn
constexpr int kBlockTile = WARPS * kTile;             // positions of a block's turn
constexpr int kPasses = (PER_KV + GROUP - 1) / GROUP; // blocks that share a kv head
constexpr int kHeads = PowerOfTwo<GROUP>::kValue;           // stride of scores; 32 / kHeads lanes work on a head's softmax
constexpr int kColumns = GROUP * HEAD;
constexpr int kRecord = (kColumns + 2 * GROUP + 3) / 4 * 4;  // floats that a split leaves for the merge
constexpr int kMaxSplits = 64;
constexpr float kNothing = -3.0e38f;  // a score below all others

struct Shared {
  __align__(16) float outputs[WARPS][kColumns];
#if FUSED
  __align__(16) float rotated[GROUP][HEAD];
#endif
  float scores[WARPS][kTile][kHeads];
  float maxima[WARPS][kHeads], sums[WARPS][kHeads];
  float split_maxima[kMaxSplits][GROUP], split_sums[kMaxSplits][GROUP];
  int is_last;
};

constexpr int kFolded = Folded<UNROLL * GROUP, kLanes>::kValue;

// The block's result: columns [GROUP * HEAD] (fewer in a last pass), a thread a column, in the asked form.
template <class ValueAt>
DEVICE void write_output(int row, int n_heads, ValueAt value_at, void* out, float* scales, float* sums) {
  const int y = blockIdx.y, n_columns = n_heads * HEAD;
  constexpr int kWidth = N_KV * PER_KV * HEAD;
  const int start = (y / kPasses * PER_KV + y % kPasses * GROUP) * HEAD;
  const long long first = static_cast<long long>(row) * kWidth + start;
  for (int base = 0; base < n_columns; base += 32 * WARPS) {
    const int column = base + threadIdx.x;
    const float v = column < n_columns ? value_at(column) : 0.0f;
#if OUT == OUT_A8
    const A8Block block = a8_block(warp_max(fabsf(v)));
    const int code = __float2int_rn(v * block.inverse);
    const int sum = warp_sum(code);
    if (column < n_columns) {
      static_cast<int8_t*>(out)[a8_place(first + column)] = static_cast<int8_t>(code);
      if (lane_id() == 0) {
        scales[(first + column) / 32] = block.scale;
        sums[(first + column) / 32] = block.scale * static_cast<float>(sum);
      }
    }
#else
    if (column < n_columns) {
      if (OUT == OUT_H16) static_cast<__half*>(out)[first + column] = __float2half_rn(v);
      else static_cast<float*>(out)[first + column] = v;
    }
#endif
  }
  // a mean of float16 values fits float16 as it is
  if (OUT == OUT_H16 && scales && y == 0 && threadIdx.x == 0) scales[row] = 1.0f;
}

// exp2(a - b) where a <= b; nothing has been seen yet when b is kNothing.
DEVICE float weight_of(float a, float b) { return b == kNothing ? 0.0f : exp2_approx(a - b); }

// The splits' records in ascending order into shared.outputs[0].
DEVICE void merge_splits(Shared& shared, const float* records, int n_used) {
  // loads go past the L1, which does not know what other blocks have written
  for (int i = threadIdx.x; i < n_used * GROUP; i += 32 * WARPS) {
    const float* other = records + i / GROUP * kRecord + kColumns + i % GROUP;
    shared.split_maxima[i / GROUP][i % GROUP] = __ldcg(other);
    shared.split_sums[i / GROUP][i % GROUP] = __ldcg(other + GROUP);
  }
  __syncthreads();
  for (int c = 4 * threadIdx.x; c < kColumns; c += 4 * 32 * WARPS) {
    const int h = c / HEAD;
    float highest = kNothing, total = 0.0f;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < n_used; s++) highest = fmaxf(highest, shared.split_maxima[s][h]);
#pragma unroll 16
    for (int s = 0; s < n_used; s++) {
      const float4 other = __ldcg(reinterpret_cast<const float4*>(records + s * kRecord + c));
      const float weight = weight_of(shared.split_maxima[s][h], highest);
      total += weight * shared.split_sums[s][h];
      value.x += weight * other.x;
      value.y += weight * other.y;
      value.z += weight * other.z;
      value.w += weight * other.w;
    }
    const float inverse = 1.0f / total;
    *reinterpret_cast<float4*>(&shared.outputs[0][c]) =
        make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
  }
}
