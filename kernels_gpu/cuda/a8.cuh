// Where the codes of rows of int8 activations ("a8", graph/activation.py) lie. Rows follow one another without gaps, and what
// follows is cut into blocks of 256. Of a block come first the first 16 codes of each of its eight units of 32, then the
// last 16 of each: eight lanes with a unit each read 128 bytes that follow one another. In the second half units four apart
// have changed places, so that lanes which read both halves of four units (Q8_0) find them in different banks.
#pragma once
#include "common.cuh"

// Byte of the code that is number `at` of all rows; the 16 of a half follow one another.
template <class Int>
DEVICE constexpr Int a8_place(Int at) {
  return (at & ~Int(240)) | (at & 16) << 3 | ((at >> 1 & 112) ^ (at & 16) << 2);
}
constexpr int kA8Half = 192;  // the place of the code 16 after the first of a unit is that one's xor this
