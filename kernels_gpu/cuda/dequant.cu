// out = gain * w as float16: packed weights for a matrix product of a library. Bound by the bandwidth of writing.
//
// A lane decodes one step; the lanes of a warp then exchange them, so that each store of a warp is 512 bytes in a row.
// Defines: TYPE (a struct of weights.cuh), WARPS (a block).
#include "weights.cuh"

DEVICE uint32_t two_halves(float a, float b) { return bits_as<uint32_t>(__floats2half2_rn(a, b)); }

// Of the piece of 16 bytes in shared memory: the eight lanes that are served together find different banks.
template <int kPieces>
DEVICE int place_of(int lane, int piece) {
  return lane * kPieces + (piece ^ (lane * kPieces / 8 & (kPieces - 1)));
}

// A step of a block type; item counts steps from the start of `out`, which rows fill without gaps.
template <class T>
DEVICE void store_block(const float* values, half* out, long long item, long long n_items) {
  constexpr int kPieces = T::kColumns / 8;
  __shared__ uint4 pieces[WARPS][32 * kPieces];
  const int warp = threadIdx.x / 32, lane = lane_id();
#pragma unroll
  for (int p = 0; p < kPieces; p++) {
    const float* v = values + 8 * p;
    pieces[warp][place_of<kPieces>(lane, p)] =
        make_uint4(two_halves(v[0], v[1]), two_halves(v[2], v[3]), two_halves(v[4], v[5]), two_halves(v[6], v[7]));
  }
  __syncwarp();
  const long long first = (item - lane) * kPieces;
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const int piece = i * 32 + lane;
    if (first + piece < n_items * kPieces)
      reinterpret_cast<uint4*>(out)[first + piece] = pieces[warp][place_of<kPieces>(piece / kPieces, piece % kPieces)];
  }
}

// A step of a float type, whose row may end within it.
template <class T>
DEVICE void store_floats(const float* values, half* row, int first, int columns) {
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 4) {
    if (columns % T::kColumns == 0) {
      *reinterpret_cast<uint2*>(row + first + c) =
          make_uint2(two_halves(values[c], values[c + 1]), two_halves(values[c + 2], values[c + 3]));
    } else {
#pragma unroll
      for (int i = c; i < c + 4; i++)
        if (first + i < columns) row[first + i] = __float2half_rn(values[i]);
    }
  }
}

template <class T>
DEVICE void dequantize_step(const void* w, int n_rows, int columns, int first_row, int rows, float gain, half* out) {
  const long long item = static_cast<long long>(blockIdx.x) * (WARPS * 32) + threadIdx.x;
  const int steps = ceil_div(columns, T::kColumns);
  const long long n_items = static_cast<long long>(rows) * steps;
  const bool active = item < n_items;
  const int row = active ? static_cast<int>(item / steps) : 0, step = active ? static_cast<int>(item % steps) : 0;
  typename T::Tile tile;
  const typename T::Parts parts(w, n_rows, columns);
  if (active) T::visit(LoadTile(), tile, parts, first_row + row, step);
  else T::visit(ClearTile(), tile, parts, 0, step);
  wait_for_previous();  // weights never change, but `out` may still be read
  let_next_start();
  float values[T::kColumns];
  decode<T>(tile, step, values);
#pragma unroll
  for (int c = 0; c < T::kColumns; c++) values[c] *= gain;
  if constexpr (T::kWords > 0) store_block<T>(values, out, item, n_items);
  else if (active) store_floats<T>(values, out + static_cast<long long>(row) * columns, step * T::kColumns, columns);
}

// Rows first_row .. first_row + rows of a matrix [n_rows, columns] into out [rows, columns]; one step for each thread.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    dequantize(const void* w, int n_rows, int columns, int first_row, int rows, float gain, half* out) {
  dequantize_step<TYPE>(w, n_rows, columns, first_row, rows, gain, out);
}
