// What the ranks of a tensor split do before they add up what they have. Bound by memory.
// Defines: THREADS.
#include "ptx.cuh"

// out[row] = zeros but for columns first .. first + part, which are x[row]: the sum over the ranks is their columns side by side.
// Grid (blocks along a row, rows).
extern "C" __global__ void __launch_bounds__(THREADS) place_columns(const float* x, int part, int first, int total, float* out) {
  let_next_start();
  wait_for_previous();
  const int column = blockIdx.x * THREADS + threadIdx.x, own = column - first;
  const long long row = blockIdx.y;
  if (column < total) out[row * total + column] = own >= 0 && own < part ? x[row * part + own] : 0.0f;
}
