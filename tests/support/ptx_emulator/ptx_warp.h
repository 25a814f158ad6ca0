// Where threads meet: shuffles, votes, barriers, ldmatrix and mma. PTX ISA 8.8: "shfl.sync", "vote.sync", "match.sync", "redux.sync",
// "bar", "ldmatrix", and "Matrix Fragments for mma"; what they call groupID is `lane / 4`, threadID_in_group `lane % 4`.
#pragma once
#include "ptx_memory.h"

static inline void meet(Context& c, uint32_t line, const char* what, uint32_t mask, const void* in, void* out, EmulatorCombine combine, int orders_memory = 0) {
  site = line;
  TRACE(trace_warp_sync(c.thread, mask, orders_memory));
  emulator_collective(what, mask, in, out, combine);
}

struct Shuffle { uint32_t value, from; };
static void shuffle_all(uint32_t mask, const void* const* in, void* const* out) {
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) {
      const uint32_t from = static_cast<const Shuffle*>(in[l])->from;
      if (!(mask >> from & 1)) fail("shfl.sync: lane %d reads lane %u, which is not in its mask %08x", l, from, mask);
      *static_cast<uint32_t*>(out[l]) = static_cast<const Shuffle*>(in[from])->value;
    }
}
enum ShuffleMode { kUpward, kDownward, kButterfly, kIndexed };
static uint32_t shfl(Context& c, uint32_t line, const char* what, ShuffleMode mode, uint32_t a, uint32_t b, uint32_t cc, uint32_t mask, bool* valid) {
  const int lane = c.lane, bval = b & 31, cval = cc & 31, segment = cc >> 8 & 31;
  const int most_lane = (lane & segment) | (cval & ~segment & 31), least_lane = lane & segment;
  int j = 0;
  switch (mode) {
    case kUpward: j = lane - bval, *valid = j >= most_lane; break;
    case kDownward: j = lane + bval, *valid = j <= most_lane; break;
    case kButterfly: j = lane ^ bval, *valid = j <= most_lane; break;
    case kIndexed: j = least_lane | (bval & ~segment & 31), *valid = j <= most_lane; break;
  }
  Shuffle in{a, uint32_t(*valid ? j : lane)};
  uint32_t out = 0;
  meet(c, line, what, mask, &in, &out, shuffle_all);
  return out;
}

static void ballot_all(uint32_t mask, const void* const* in, void* const* out) {
  uint32_t r = 0;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) r |= uint32_t(*static_cast<const bool*>(in[l])) << l;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) *static_cast<uint32_t*>(out[l]) = r;
}
static uint32_t ballot(Context& c, uint32_t line, const char* what, bool p, uint32_t mask) {
  uint32_t out = 0;
  meet(c, line, what, mask, &p, &out, ballot_all);
  return out;
}
static void gather_all(uint32_t mask, const void* const* in, void* const* out) {  // every lane gets all values
  for (int l = 0; l < 32; l++)
    for (int k = 0; k < 32 && (mask >> l & 1); k++)
      static_cast<uint64_t*>(out[l])[k] = mask >> k & 1 ? *static_cast<const uint64_t*>(in[k]) : 0;
}
static uint32_t match_any(Context& c, uint32_t line, const char* what, uint64_t value, uint32_t mask) {
  uint64_t all[32];
  meet(c, line, what, mask, &value, all, gather_all);
  uint32_t r = 0;
  for (int k = 0; k < 32; k++) r |= uint32_t((mask >> k & 1) && all[k] == value) << k;
  return r;
}
template <class T, class F> static T redux(Context& c, uint32_t line, const char* what, T value, uint32_t mask, F f) {
  uint64_t all[32], in = uint64_t(value);
  meet(c, line, what, mask, &in, all, gather_all);
  T r = value;
  for (int k = 0; k < 32; k++)
    if ((mask >> k & 1) && k != int(c.lane)) r = f(r, T(all[k]));
  return r;
}
static void bar_warp(Context& c, uint32_t line, uint32_t mask) { meet(c, line, "bar.warp.sync", mask, nullptr, nullptr, nullptr, 1); }

// bar.sync and bar.red are `.aligned`: the lanes of a warp come to the same one
static int block_barrier(Context& c, uint32_t line, int which, bool value) {
  const uint32_t n = emulator_block_size.x * emulator_block_size.y * emulator_block_size.z, warp = c.thread / 32;
  site = line;
  if (warp_generation[warp] != barrier_generation) warp_generation[warp] = barrier_generation, warp_site[warp] = line;
  if (warp_site[warp] != line) fail("lanes of a warp meet in different barriers, of lines %u and %u of the PTX", warp_site[warp], line);
  if (++n_at_barrier == n) n_at_barrier = 0, barrier_generation++;
  TRACE(trace_block_barrier(c.thread, int(n)));
  return emulator_syncthreads(which, value);
}

// ---- ldmatrix: lane i brings the row i % 8 of tile i / 8
struct Rows { const unsigned char* row; int n; bool transposed; };
static void ldmatrix_all(uint32_t, const void* const* in, void* const* out) {
  const Rows& first = *static_cast<const Rows*>(in[0]);
  for (int tile = 0; tile < first.n; tile++)
    for (int lane = 0; lane < 32; lane++) {
      uint32_t r = 0;
      for (int i = 0; i < 2; i++) {
        int row = lane / 4, column = 2 * (lane % 4) + i;
        if (first.transposed) { const int t = row; row = column; column = t; }
        r |= uint32_t(fetch<uint16_t>(static_cast<const Rows*>(in[8 * tile + row])->row + 2 * column)) << 16 * i;
      }
      static_cast<uint32_t*>(out[lane])[tile] = r;
    }
}
static Vector<uint32_t, 4> ldmatrix(Context& c, uint32_t line, const char* what, int n, bool transposed, uint64_t address) {
  Rows in{nullptr, n, transposed};
  Vector<uint32_t, 4> out = {};
  site = line;
  // addresses of the other lanes are not looked at, but sm_75 wants them valid as well
  if (int(c.lane) < 8 * n) in.row = shared_memory(c, line, address, 16, 'r');
  else if (kArch < 80) aligned(address, 16), shared_place(address, 16);
  meet(c, line, what, 0xffffffffu, &in, &out, ldmatrix_all);
  return out;
}

// ---- mma: a fragment says for each lane and element which row and column it is
struct Place { int row, column; };
struct A16x16 { enum { kElements = 8 }; static Place of(int l, int i) { return {l / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8), l % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)}; } };
struct B16x8 { enum { kElements = 4 }; static Place of(int l, int i) { return {l % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), l / 4}; } };
struct A16x8 { enum { kElements = 4 }; static Place of(int l, int i) { return {l / 4 + (i < 2 ? 0 : 8), l % 4 * 2 + (i & 1)}; } };
struct B8x8 { enum { kElements = 2 }; static Place of(int l, int i) { return {l % 4 * 2 + i, l / 4}; } };
struct A16x32 { enum { kElements = 16 }; static Place of(int l, int i) { return {l / 4 + (i < 4 || (i >= 8 && i < 12) ? 0 : 8), l % 4 * 4 + (i & 3) + (i < 8 ? 0 : 16)}; } };
struct B32x8 { enum { kElements = 8 }; static Place of(int l, int i) { return {l % 4 * 4 + (i & 3) + (i < 4 ? 0 : 16), l / 4}; } };
struct A8x16 { enum { kElements = 4 }; static Place of(int l, int i) { return {l / 4, l % 4 * 4 + i}; } };
struct B16x8Bytes { enum { kElements = 4 }; static Place of(int l, int i) { return {l % 4 * 4 + i, l / 4}; } };
struct C16x8 { enum { kElements = 4 }; static Place of(int l, int i) { return {l / 4 + (i < 2 ? 0 : 8), l % 4 * 2 + (i & 1)}; } };
struct C8x8 { enum { kElements = 2 }; static Place of(int l, int i) { return {l / 4, l % 4 * 2 + i}; } };

struct HalfElement { typedef uint16_t Stored; typedef double Value; static double of(uint16_t v) { return half_value(v); } };
struct BfloatElement { typedef uint16_t Stored; typedef double Value; static double of(uint16_t v) { return bfloat_value(v); } };
struct ByteElement { typedef int8_t Stored; typedef int64_t Value; static int64_t of(int8_t v) { return v; } };
struct UnsignedByteElement { typedef uint8_t Stored; typedef int64_t Value; static int64_t of(uint8_t v) { return v; } };
static ALWAYS uint32_t mma_result(double v) { return bits(canonical(float(v))); }
static ALWAYS uint32_t mma_result(int64_t v) { return uint32_t(v); }
static ALWAYS double mma_start(uint32_t v, double) { return to_float(v); }
static ALWAYS int64_t mma_start(uint32_t v, int64_t) { return int32_t(v); }

struct Fragments { uint32_t a[4], b[2], c[4]; };
template <class ElementA, class ElementB, class A, class B, class C, int kDepth>
static void mma_all(uint32_t, const void* const* in, void* const* out) {
  typedef typename ElementA::Value Value;
  Value a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments& f = *static_cast<const Fragments*>(in[lane]);
    for (int i = 0; i < A::kElements; i++) {
      typename ElementA::Stored e;
      memcpy(&e, reinterpret_cast<const unsigned char*>(f.a) + sizeof e * i, sizeof e);
      a[A::of(lane, i).row][A::of(lane, i).column] = ElementA::of(e);
    }
    for (int i = 0; i < B::kElements; i++) {
      typename ElementB::Stored e;
      memcpy(&e, reinterpret_cast<const unsigned char*>(f.b) + sizeof e * i, sizeof e);
      b[B::of(lane, i).row][B::of(lane, i).column] = ElementB::of(e);
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < C::kElements; i++) {
      const Place p = C::of(lane, i);
      Value sum = mma_start(static_cast<const Fragments*>(in[lane])->c[i], Value());
      for (int k = 0; k < kDepth; k++) sum += a[p.row][k] * b[k][p.column];
      static_cast<uint32_t*>(out[lane])[i] = mma_result(sum);
    }
}
static Vector<uint32_t, 4> mma(Context& c, uint32_t line, const char* what, const Fragments& f, EmulatorCombine combine) {
  Vector<uint32_t, 4> out = {};
  meet(c, line, what, 0xffffffffu, &f, &out, combine);
  return out;
}
