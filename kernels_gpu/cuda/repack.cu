// Blocks as in a GGUF file into the layout of `weights_layout.py`. Runs once for each matrix, behind the copy from the host,
// which bounds it.
//
// Defines: TYPE (a struct of weights.cuh and of raw_blocks.cuh), THREADS.
#include "raw_blocks.cuh"

// Bits kShift.. of two-bit codes of 32 columns: byte 4j + b holds columns 16j + 4i + b at bits 2i.
DEVICE uint2 pack_pairs(const int* q, int shift) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int c = 0; c < 32; c++) words[c / 16] |= static_cast<uint32_t>(q[c] >> shift & 3) << (c % 4 * 8 + c / 4 % 4 * 2);
  return make_uint2(words[0], words[1]);
}

DEVICE uint4 pack_nibbles(const int* q) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int c = 0; c < 32; c++) words[c % 16 / 4] |= static_cast<uint32_t>(q[c] & 15) << (c % 4 * 8 + c / 16 * 4);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

DEVICE uint4 pack_bytes(const int* q) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int c = 0; c < 16; c++) words[c / 4] |= static_cast<uint32_t>(q[c] & 255) << c % 4 * 8;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One bit of 32 columns: bit g of byte b is column 4g + b.
DEVICE uint32_t pack_bits(const int* q, int shift) {
  uint32_t word = 0;
#pragma unroll
  for (int c = 0; c < 32; c++) word |= static_cast<uint32_t>(q[c] >> shift & 1) << (c % 4 * 8 + c / 4);
  return word;
}

template <class Raw, class Packed>
DEVICE void repack_unit(const uint8_t* rows, int n_rows, int columns, int first_row, int total_rows, void* out) {
  const int units = columns / 32;
  const long long item = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
  if (item >= static_cast<long long>(n_rows) * units) return;
  const int unit = static_cast<int>(item % units), u = unit % Raw::kUnits, row = first_row + static_cast<int>(item / units);
  const uint8_t* block = rows + item / Raw::kUnits * Raw::kBytes;  // rows are whole blocks
  int q[32];
#pragma unroll
  for (int c = 0; c < 32; c++) q[c] = Raw::code(block, u, c);
  const typename Packed::Parts p(out, total_rows, columns);
  const int at = row * units_of_row(columns) + unit;
  if constexpr (Raw::kLow == 8) {
    raw::put(p.codes, 2 * at, pack_bytes(q));
    raw::put(p.codes, 2 * at + 1, pack_bytes(q + 16));
  }
  if constexpr (Raw::kLow == 4) raw::put(p.codes, at, pack_nibbles(q));
  if constexpr (Raw::kLow == 2) raw::put(p.codes, at, pack_pairs(q, 0));
  if constexpr (Raw::kHigh == 2) raw::put(p.high, at, pack_pairs(q, Raw::kLow));
  if constexpr (Raw::kHigh == 1) raw::put(p.high, at, pack_bits(q, Raw::kLow));
  Raw::scales(block, u, p, at, row, unit);
}

// `rows`: n_rows rows of a file, which are those from first_row on of a matrix [total_rows, columns]; `out` is all of it, and
// was zero before: what rows are padded with is not written.
extern "C" __global__ void __launch_bounds__(THREADS)
    repack(const uint8_t* rows, int n_rows, int columns, int first_row, int total_rows, void* out) {
  repack_unit<raw::TYPE, TYPE>(rows, n_rows, columns, first_row, total_rows, out);
}
