// One head through its norm and its rotation, by one warp, into shared memory.
// Defines: HEAD, N_DIMS (columns that rotate, even), PAIRING, NORM (1: each head is normalized first).
#pragma once
#include "ptx.cuh"

#define PAIRING_INTERLEAVED 0
#define PAIRING_HALF 1

// x: HEAD floats; weight: HEAD, with NORM; angles: (cos, sin) [N_DIMS/2] of the head's token.
template <bool kNorm, bool kRotate>
DEVICE void rotate_head(const float* x, const float* weight, float eps, const float2* angles, float* out) {
  constexpr int kHalf = N_DIMS / 2, kColumns = (HEAD + 31) / 32, kPairs = (kHalf + 31) / 32;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const int column = lane_id() + 32 * i;
    if (column < HEAD) out[column] = x[column];
  }
  __syncwarp();
  if (kNorm) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int column = lane_id() + 32 * i;
      const float v = column < HEAD ? out[column] : 0.0f;
      sum += v * v;
    }
    const float factor = 1.0f / sqrtf(warp_sum(sum) / HEAD + eps);
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int column = lane_id() + 32 * i;
      if (column < HEAD) out[column] = out[column] * factor * weight[column];
    }
    __syncwarp();
  }
  if (kRotate) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int pair = lane_id() + 32 * i;
      if (pair < kHalf) {
        const int first = PAIRING == PAIRING_HALF ? pair : 2 * pair;
        const int second = PAIRING == PAIRING_HALF ? pair + kHalf : 2 * pair + 1;
        const float2 turn = angles[pair];
        const float u = out[first], v = out[second];
        out[first] = u * turn.x - v * turn.y;
        out[second] = u * turn.y + v * turn.x;
      }
    }
    __syncwarp();
  }
}
