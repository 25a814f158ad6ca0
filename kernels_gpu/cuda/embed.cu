// out[m] = table[ids[m]] * scale: rows of packed weights as float32. A few kilobytes: bound by latency.
//
// Defines: TYPE (a struct of weights.cuh), THREADS, RAGGED (float types: columns are no multiple of 4).
#include "weights.cuh"

// Grid (blocks along a row, rows). An id below 0 gives a row of zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const void* table, int n_rows, int columns, const int* ids, float scale, float* out) {
  wait_for_previous();
  let_next_start();
  const int step = blockIdx.x * THREADS + threadIdx.x, first = step * TYPE::kColumns;
  if (first >= columns) return;
  const int id = ids[blockIdx.y];
  float* row = out + static_cast<long long>(blockIdx.y) * columns + first;
  TYPE::Tile tile;
  const TYPE::Parts parts(table, n_rows, columns);
  if (id >= 0) TYPE::visit(LoadTile(), tile, parts, id, step);
  else TYPE::visit(ClearTile(), tile, parts, 0, step);
  float w[TYPE::kColumns];
  decode<TYPE>(tile, step, w);
#pragma unroll
  for (int c = 0; c < TYPE::kColumns; c += 4) {
    const float4 v = make_float4(w[c] * scale, w[c + 1] * scale, w[c + 2] * scale, w[c + 3] * scale);
    if (RAGGED) {
      const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (first + c + i < columns) row[c + i] = values[i];
    } else if (first + c < columns) {
      *reinterpret_cast<float4*>(row + c) = v;
    }
  }
}
