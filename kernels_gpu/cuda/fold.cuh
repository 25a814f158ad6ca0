// Sums over the lanes of a vector.
#pragma once
#include "ptx.cuh"

template <int n>
struct PowerOfTwo {  // the smallest that is at least n
  static constexpr int kValue = 2 * PowerOfTwo<(n + 1) / 2>::kValue;
};
template <>
struct PowerOfTwo<1> {
  static constexpr int kValue = 1;
};

struct Sum {
  static DEVICE float join(float a, float b) { return a + b; }
};
struct Largest {  // of numbers that are not negative
  static DEVICE float join(float a, float b) { return fmaxf(a, b); }
};

// Sum n values over lanes, kOffset apart in the first step, halving their number at each step instead of giving all sums to all.
// Afterwards this lane has `count` sums, those of values index..index + count - 1, in values[0..].
template <int kLeft, int kOffset, int kSize, class Join = Sum>
struct Fold {
  static DEVICE void run(float (&values)[kSize], int& index, int& count) {
    constexpr int kHalf = (kLeft + 1) / 2;
    const bool upper = lane_id() & kOffset;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const float high = i + kHalf < kLeft ? values[i + kHalf] : 0.0f;
      const float sent = upper ? values[i] : high;
      values[i] = Join::join(upper ? high : values[i], __shfl_xor_sync(FULL_WARP, sent, kOffset));
    }
    index += upper ? kHalf : 0;
    count = upper ? max(count - kHalf, 0) : min(count, kHalf);
    Fold<kHalf, kOffset / 2, kSize, Join>::run(values, index, count);
  }
};

template <int kLeft, int kSize, class Join>
struct Fold<kLeft, 0, kSize, Join> {
  static DEVICE void run(float (&)[kSize], int&, int&) {}
};

template <int n, int kOver>
struct Folded {  // sums that a lane is left with
  static constexpr int kValue = Folded<(n + 1) / 2, kOver / 2>::kValue;
};
template <int n>
struct Folded<n, 1> {
  static constexpr int kValue = n;
};
