// Finding a block's work among the sequences of a step, by the lanes of a warp.
#pragma once
#include "ptx.cuh"

struct Unit {
  int sequence, local;    // the unit is the local-th of its sequence; sequence -1: there is no such unit,
                          // and it would be the local-th after the last
  int from, count;        // first token of the sequence and how many it has
};

// The index-th unit when each sequence has units_of(its number of tokens) of them, in order. sequence_starts is
// [n_sequences + 1]; every lane gets the result.
template <class UnitsOf>
DEVICE Unit find_unit(int index, const int* sequence_starts, int n_sequences, UnitsOf units_of) {
  int before = 0;
  for (int s = 0; s < n_sequences; s += 32) {
    const int mine = s + lane_id();
    const int from = mine < n_sequences ? sequence_starts[mine] : 0;
    const int count = mine < n_sequences ? sequence_starts[mine + 1] - from : 0;
    const int units = units_of(count);
    int through = units;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(FULL_WARP, through, o);
      if (lane_id() >= o) through += other;
    }
    const uint32_t past = __ballot_sync(FULL_WARP, before + through > index);
    if (past) {
      const int owner = __ffs(past) - 1;
      const int local = index - before - __shfl_sync(FULL_WARP, through - units, owner);
      return {s + owner, local, __shfl_sync(FULL_WARP, from, owner), __shfl_sync(FULL_WARP, count, owner)};
    }
    before += __shfl_sync(FULL_WARP, through, 31);
  }
  return {-1, index - before, 0, 0};
}
