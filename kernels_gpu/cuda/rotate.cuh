// One head through its norm and its rotation, by one warp, into shared memory.
// Defines: HEAD, N_DIMS (columns that rotate, even), PAIRING.
#pragma once
#include "ptx.cuh"

#define PAIRING_INTERLEAVED 0
#define PAIRING_HALF 1

// HEAD columns as they are.
DEVICE void copy_head(const float* x, float* out) {
#pragma unroll
  for (int column = 0; column < HEAD; column += 32)
    if (column + lane_id() < HEAD) out[column + lane_id()] = x[column + lane_id()];
  __syncwarp();
}

// x: HEAD floats, 8-byte aligned as `out` is; weight: HEAD, with kNorm; angles: (cos, sin) [N_DIMS/2] of the head's token. A lane
// works on pairs lane, lane + 32, ... and on as many of the columns that do not rotate; all loads come first.
template <bool kNorm>
DEVICE void rotate_head(const float* x, const float* weight, float eps, const float2* angles, float* out) {
  constexpr int kHalf = N_DIMS / 2, kPairs = (kHalf + 31) / 32, kRest = (HEAD - N_DIMS + 31) / 32;
  const auto first_of = [](int pair) { return PAIRING == PAIRING_HALF ? pair : 2 * pair; };
  const auto second_of = [](int pair) { return PAIRING == PAIRING_HALF ? pair + kHalf : 2 * pair + 1; };
  float u[kPairs], v[kPairs], rest[kRest + 1];
  float2 turns[kPairs];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const int pair = lane_id() + 32 * i;
    const bool there = pair < kHalf;
    if (PAIRING == PAIRING_INTERLEAVED) {
      const float2 both = there ? reinterpret_cast<const float2*>(x)[pair] : make_float2(0.0f, 0.0f);
      u[i] = both.x, v[i] = both.y;
    } else {
      u[i] = there ? x[first_of(pair)] : 0.0f;
      v[i] = there ? x[second_of(pair)] : 0.0f;
    }
    turns[i] = there ? angles[pair] : make_float2(0.0f, 0.0f);
  }
#pragma unroll
  for (int i = 0; i < kRest; i++) {
    const int column = N_DIMS + lane_id() + 32 * i;
    rest[i] = column < HEAD ? x[column] : 0.0f;
  }
  if (kNorm) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) sum += u[i] * u[i] + v[i] * v[i];
#pragma unroll
    for (int i = 0; i < kRest; i++) sum += rest[i] * rest[i];
    const float factor = 1.0f / sqrtf(warp_sum(sum) / HEAD + eps);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int pair = min(lane_id() + 32 * i, kHalf - 1);
      u[i] *= factor * weight[first_of(pair)];
      v[i] *= factor * weight[second_of(pair)];
    }
#pragma unroll
    for (int i = 0; i < kRest; i++) rest[i] *= factor * weight[min(N_DIMS + lane_id() + 32 * i, HEAD - 1)];
  }
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const int pair = lane_id() + 32 * i;
    if (pair >= kHalf) continue;
    const float2 turned = make_float2(u[i] * turns[i].x - v[i] * turns[i].y, u[i] * turns[i].y + v[i] * turns[i].x);
    if (PAIRING == PAIRING_INTERLEAVED) reinterpret_cast<float2*>(out)[pair] = turned;
    else out[first_of(pair)] = turned.x, out[second_of(pair)] = turned.y;
  }
#pragma unroll
  for (int i = 0; i < kRest; i++) {
    const int column = N_DIMS + lane_id() + 32 * i;
    if (column < HEAD) out[column] = rest[i];
  }
  __syncwarp();
}
