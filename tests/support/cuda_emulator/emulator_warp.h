// Where the lanes of a warp meet: barriers, shuffles, votes, ldmatrix and mma. Every result is computed when the last lane came.
#pragma once

#define __syncthreads() ((void)emulator_syncthreads(__LINE__, 0))
#define __syncthreads_count(p) emulator_syncthreads(__LINE__, (p) != 0)
#define __syncthreads_or(p) (emulator_syncthreads(__LINE__, (p) != 0) != 0)
#define __syncthreads_and(p) (emulator_syncthreads(__LINE__, (p) == 0) == 0)

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator_collective("__syncwarp", mask, nullptr, nullptr, nullptr); }
inline unsigned __activemask() { return 0xffffffffu; }

template <class T> struct EmulatorShuffle { T value; int source; };
template <class T>
void emulator_shuffle(unsigned mask, const void* const* in, void* const* out) {
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) {
      const int source = static_cast<const EmulatorShuffle<T>*>(in[l])->source;
      if (!(mask >> source & 1)) emulator_fail("a shuffle reads a lane that is not in its mask");
      memcpy(out[l], &static_cast<const EmulatorShuffle<T>*>(in[source])->value, sizeof(T));
    }
}
inline int emulator_lane() {
  return (emulator_thread.x + emulator_block_size.x * (emulator_thread.y + emulator_block_size.y * emulator_thread.z)) & 31;
}
template <class T>
T emulator_shuffle_from(const char* what, unsigned mask, T value, int source) {
  EmulatorShuffle<T> in{value, source};
  T out;
  emulator_collective(what, mask, &in, &out, emulator_shuffle<T>);
  return out;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulator_lane();
  return emulator_shuffle_from("__shfl_sync", mask, value, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulator_lane(), source = lane ^ bits;
  return emulator_shuffle_from("__shfl_xor_sync", mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator_lane(), source = lane + int(delta);
  return emulator_shuffle_from("__shfl_down_sync", mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator_lane(), source = lane - int(delta);
  return emulator_shuffle_from("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}

inline void emulator_vote(unsigned mask, const void* const* in, void* const* out) {
  unsigned bits = 0;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) bits |= unsigned(*static_cast<const int*>(in[l]) != 0) << l;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) *static_cast<unsigned*>(out[l]) = bits;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned bits;
  emulator_collective("__ballot_sync", mask, &predicate, &bits, emulator_vote);
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

struct EmulatorTiles { const void* row; int n; bool transpose; };
inline void emulator_ldmatrix_combine(unsigned, const void* const* in, void* const* out) {
  const EmulatorTiles& first = *static_cast<const EmulatorTiles*>(in[0]);
  for (int tile = 0; tile < first.n; tile++)
    for (int l = 0; l < 32; l++) {
      unsigned r = 0;
      for (int i = 0; i < 2; i++) {
        const int row = first.transpose ? 2 * (l % 4) + i : l / 4, column = first.transpose ? l / 4 : 2 * (l % 4) + i;
        const void* source = static_cast<const EmulatorTiles*>(in[8 * tile + row])->row;
        r |= unsigned(static_cast<const unsigned short*>(source)[column]) << 16 * i;
      }
      static_cast<unsigned*>(out[l])[tile] = r;
    }
}
inline void emulator_ldmatrix(unsigned* r, int n, const void* row, bool transpose) {
  if (emulator_lane() < 8 * n && reinterpret_cast<uintptr_t>(row) % 16) emulator_fail("a misaligned ldmatrix");
  EmulatorTiles in{row, n, transpose};
  emulator_collective("ldmatrix", 0xffffffffu, &in, r, emulator_ldmatrix_combine);
}

// a: 16 x K and b: K x 8 as fragments of the PTX ISA, elements of 16 bits (K = 16) or 8 bits (K = 32)
template <class T> struct EmulatorFragments { unsigned a[4], b[2]; T d[4]; };
template <class T, class Element, int kElements, class Value>
void emulator_mma(unsigned, const void* const* in, void* const* out, Value value) {
  const int kHalf = 4 * kElements;  // columns of one register pair
  typedef EmulatorFragments<T> Fragments;
  T a[16][2 * kHalf], b[2 * kHalf][8];
  for (int l = 0; l < 32; l++) {
    const Fragments& f = *static_cast<const Fragments*>(in[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) {
      Element e[kElements];
      memcpy(e, &f.a[r], 4);
      for (int i = 0; i < kElements; i++) a[g + 8 * (r & 1)][kElements * t + i + kHalf * (r >> 1)] = value(e[i]);
    }
    for (int r = 0; r < 2; r++) {
      Element e[kElements];
      memcpy(e, &f.b[r], 4);
      for (int i = 0; i < kElements; i++) b[kElements * t + i + kHalf * r][g] = value(e[i]);
    }
  }
  for (int l = 0; l < 32; l++) {
    const Fragments& f = *static_cast<const Fragments*>(in[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) {
      T sum = f.d[i];
      for (int k = 0; k < 2 * kHalf; k++) sum += a[g + 8 * (i >> 1)][k] * b[k][2 * t + (i & 1)];
      static_cast<T*>(out[l])[i] = sum;
    }
  }
}
inline float emulator_half_element(unsigned short v) { return emulator_half_value(v); }
inline float emulator_bfloat_element(unsigned short v) { return emulator_bfloat_value(v); }
inline int emulator_byte_element(signed char v) { return v; }
inline void emulator_mma_f16_combine(unsigned mask, const void* const* in, void* const* out) {
  emulator_mma<float, unsigned short, 2>(mask, in, out, emulator_half_element);
}
inline void emulator_mma_bf16_combine(unsigned mask, const void* const* in, void* const* out) {
  emulator_mma<float, unsigned short, 2>(mask, in, out, emulator_bfloat_element);
}
inline void emulator_mma_s8_combine(unsigned mask, const void* const* in, void* const* out) {
  emulator_mma<int, signed char, 4>(mask, in, out, emulator_byte_element);
}
template <class T>
void emulator_mma_call(const char* what, T* d, const unsigned* a, const unsigned* b, EmulatorCombine combine) {
  EmulatorFragments<T> in;
  memcpy(in.a, a, 16);
  memcpy(in.b, b, 8);
  memcpy(in.d, d, 16);
  emulator_collective(what, 0xffffffffu, &in, d, combine);
}
inline void emulator_mma_f16(float* d, const unsigned* a, const unsigned* b) {
  emulator_mma_call("mma_f16", d, a, b, emulator_mma_f16_combine);
}
inline void emulator_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
  emulator_mma_call("mma_bf16", d, a, b, emulator_mma_bf16_combine);
}
inline void emulator_mma_s8(int* d, const unsigned* a, const unsigned* b) {
  emulator_mma_call("mma_s8", d, a, b, emulator_mma_s8_combine);
}
