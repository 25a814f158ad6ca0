// out[n] = sum_k w[n, k]^2 of packed weights, float32: bounds how large a product with a normed row can be. A warp a row.
// Defines: TYPE (a struct of weights.cuh), WARPS (a block).
#include "weights.cuh"

template <class T>
DEVICE void sum_squares(const void* w, int n_rows, int columns, int row, float* out) {
  const typename T::Parts parts(w, n_rows, columns);
  const int steps = ceil_div(columns, T::kColumns);
  float sum = 0.0f;
  for (int step = lane_id(); step < steps; step += 32) {
    typename T::Tile tile;
    T::visit(LoadTile(), tile, parts, row, step);
    float values[T::kColumns];
    decode<T>(tile, step, values);
#pragma unroll
    for (int c = 0; c < T::kColumns; c++) sum += step * T::kColumns + c < columns ? values[c] * values[c] : 0.0f;
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) out[row] = sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) row_squares(const void* w, int n_rows, int columns, float* out) {
  const int row = blockIdx.x * WARPS + (threadIdx.x >> 5);
  wait_for_previous();
  let_next_start();
  if (row < n_rows) sum_squares<TYPE>(w, n_rows, columns, row, out);
}
