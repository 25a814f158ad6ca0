// State spaces: every access is checked for its bounds and alignment and, with PTX_TRACE, told to trace.cpp.
//
// Shared memory is a window of 32-bit addresses: from kSharedBase on what functions declare, variables 256 bytes further apart
// than on a GPU (so that what runs past one is found; banks stay the same), then the dynamic part. A generic address of it has
// kWindow added. Global memory is that of the buffers which `ptx_launch` was told.
#pragma once
#include "ptx_half.h"

#include <vector>

#ifdef PTX_TRACE
#include "trace.h"
#define TRACE(call) call
#else
#define TRACE(call) ((void)0)
#endif

static const uint64_t kWindow = 1ull << 56;
static const unsigned char kPoison = 0xff;
struct Range { uint64_t low, high; unsigned char* marks; };  // a mark for every 4 bytes: who wrote them last, see `Overlap`
struct Copy { uint32_t site; uint64_t shared; const unsigned char* from; uint32_t n_bytes, n_read; };
struct Copies { std::vector<Copy> open; std::vector<std::vector<Copy>> groups; };  // oldest first

// of the generated file
extern const uint32_t kSharedBase, kStaticBytes;  // the dynamic part begins behind kStaticBytes
extern unsigned char static_shared[], static_valid[];
extern const int kArch;

static unsigned char* dynamic_shared;
static uint64_t n_dynamic;
static const Range* buffers;
static size_t n_buffers;
static Range last_hit;
// Programmatic dependent launch: a kernel may run while those before it do, back to the one that `oldest` marks. What each has
// written is marked; until a thread has executed griddepcontrol.wait it must neither read that nor write anything. The next one may
// start when every block has executed launch_dependents or has ended.
struct Overlap {
  bool is_on, has_waited, block_waits, block_opens_early, opens_late;
  unsigned char oldest, mark;
};
static Overlap overlap;
static Copies copies[1024];
static uint32_t barrier_generation, n_at_barrier, warp_generation[32], warp_site[32];

struct Context {
  int thread;
  uint32_t lane;
  int n_depots;
  bool has_waited;  // for the kernels before this one
  Range depots[16];  // local memory of the functions that run
};

static __attribute__((noinline)) void find_buffer(uint64_t a, uint32_t n_bytes) {
  size_t low = 0, high = n_buffers;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (buffers[middle].low <= a) low = middle + 1;
    else high = middle;
  }
  if (low && a + n_bytes <= buffers[low - 1].high) {
    last_hit = buffers[low - 1];
    return;
  }
  const Range* nearest = low ? &buffers[low - 1] : nullptr;
  if (low < n_buffers && (!nearest || int64_t(buffers[low].low - a) < int64_t(a - nearest->high))) nearest = &buffers[low];
  if (nearest && int64_t(a - nearest->low) > -(1 << 20) && int64_t(a - nearest->high) < 1 << 20)
    fail("an access at byte %lld of a buffer of %llu bytes", (long long)(a - nearest->low), (unsigned long long)(nearest->high - nearest->low));
  fail("an access at address %#llx, near no buffer", (unsigned long long)a);
}

static __attribute__((noinline)) void before_wait(uint64_t a, uint32_t n_bytes, char kind) {
  if (kind != 'r') fail("a write to global memory before griddepcontrol.wait");
  for (uint64_t at = a; last_hit.marks && at < a + n_bytes; at += 4)
    if (const unsigned char mark = last_hit.marks[(at - last_hit.low) >> 2]; mark >= overlap.oldest && mark < overlap.mark)
      fail("a read of what an earlier kernel writes before griddepcontrol.wait: byte %llu of a buffer of %llu bytes", (unsigned long long)(at - last_hit.low), (unsigned long long)(last_hit.high - last_hit.low));
}

static ALWAYS void aligned(uint64_t a, uint32_t n_bytes) {
  if (a & (n_bytes - 1)) fail("a misaligned access: address %#llx for %u bytes", (unsigned long long)a, n_bytes);
}
static inline unsigned char* global_memory(Context& c, uint32_t line, uint64_t a, uint32_t n_bytes, char kind) {
  site = line;
  aligned(a, n_bytes);
  if (a < last_hit.low || a + n_bytes > last_hit.high) find_buffer(a, n_bytes);
  if (overlap.is_on && !c.has_waited) before_wait(a, n_bytes, kind);
  if (kind != 'r' && last_hit.marks) memset(last_hit.marks + ((a - last_hit.low) >> 2), overlap.mark, (n_bytes + 3) / 4);
  TRACE(trace_access(line, kind, 'g', a, n_bytes, c.thread));
  return reinterpret_cast<unsigned char*>(a);
}
// ld.global.nc: of memory that this kernel does not write
static inline unsigned char* read_only_memory(Context& c, uint32_t line, uint64_t a, uint32_t n_bytes, char kind) {
  unsigned char* const p = global_memory(c, line, a, n_bytes, kind);
  for (uint64_t at = a; last_hit.marks && at < a + n_bytes; at += 4)
    if (last_hit.marks[(at - last_hit.low) >> 2] == overlap.mark) fail("ld.global.nc of what this kernel writes");
  return p;
}
static inline unsigned char* shared_place(uint64_t a, uint32_t n_bytes) {
  const uint64_t at = a - kSharedBase;
  if (at < kStaticBytes) {
    if (at + n_bytes <= kStaticBytes && static_valid[at] && static_valid[at + n_bytes - 1]) return static_shared + at;
    fail("an access at shared address %llu, out of the bounds of every variable", (unsigned long long)a);
  }
  if (at > 1ull << 32 || at - kStaticBytes + n_bytes > n_dynamic)
    fail("an access at byte %lld of %llu bytes of dynamic shared memory", (long long)(at - kStaticBytes), (unsigned long long)n_dynamic);
  return dynamic_shared + (at - kStaticBytes);
}
static inline unsigned char* shared_memory(Context& c, uint32_t line, uint64_t a, uint32_t n_bytes, char kind) {
  site = line;
  aligned(a, n_bytes);
  unsigned char* const p = shared_place(a, n_bytes);
  TRACE(trace_access(line, kind, 's', a - kSharedBase, n_bytes, c.thread));
  return p;
}
static inline bool is_local(const Context& c, uint64_t a, uint32_t n_bytes) {
  for (int i = 0; i < c.n_depots; i++)
    if (a >= c.depots[i].low && a + n_bytes <= c.depots[i].high) return true;
  return false;
}
static inline unsigned char* local_memory(Context& c, uint32_t line, uint64_t a, uint32_t n_bytes, char) {
  site = line;
  aligned(a, n_bytes);
  if (!is_local(c, a, n_bytes)) fail("an access out of the bounds of local memory");
  return reinterpret_cast<unsigned char*>(a);
}
static inline unsigned char* const_memory(Context&, uint32_t line, uint64_t a, uint32_t n_bytes, char) {
  site = line;
  aligned(a, n_bytes);
  if (a < last_hit.low || a + n_bytes > last_hit.high) find_buffer(a, n_bytes);
  return reinterpret_cast<unsigned char*>(a);
}
static inline unsigned char* generic_memory(Context& c, uint32_t line, uint64_t a, uint32_t n_bytes, char kind) {
  if (a >> 56 == 1) return shared_memory(c, line, a - kWindow, n_bytes, kind);
  return is_local(c, a, n_bytes) ? local_memory(c, line, a, n_bytes, kind) : global_memory(c, line, a, n_bytes, kind);
}

template <class T, int n> struct Vector { T v[n]; };
template <class T> ALWAYS T fetch(const unsigned char* p) { T r; memcpy(&r, p, sizeof(T)); return r; }
template <class T> ALWAYS void store(unsigned char* p, T v) { memcpy(p, &v, sizeof(T)); }

// ---- cp.async: the bytes arrive when the thread that asked waits for their group; until then the place holds poison
static void cp_async(Context& c, uint32_t line, uint64_t shared, uint64_t global, uint32_t n_bytes, uint32_t n_read) {
  site = line;
  if (n_read > n_bytes) fail("cp.async reads more than it writes");
  aligned(global, n_bytes);
  if (n_read) global_memory(c, line, global, n_bytes, 'r');
  aligned(shared, n_bytes);
  memset(shared_place(shared, n_bytes), kPoison, n_bytes);
  TRACE(trace_access(line, 'p', 's', shared - kSharedBase, n_bytes, c.thread));
  copies[c.thread].open.push_back(Copy{line, shared, reinterpret_cast<const unsigned char*>(global), n_bytes, n_read});
}
static void cp_async_commit(Context& c) {
  copies[c.thread].groups.push_back(copies[c.thread].open);
  copies[c.thread].open.clear();
}
static void land(Context& c, const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    unsigned char* const p = shared_place(copy.shared, copy.n_bytes);
    memcpy(p, copy.from, copy.n_read);
    memset(p + copy.n_read, 0, copy.n_bytes - copy.n_read);
    TRACE(trace_access(copy.site, 'w', 's', copy.shared - kSharedBase, copy.n_bytes, c.thread));
  }
}
static void cp_async_wait(Context& c, uint32_t line, size_t n_left) {
  site = line;
  auto& groups = copies[c.thread].groups;
  while (groups.size() > n_left) {
    land(c, groups.front());
    groups.erase(groups.begin());
  }
}
static void cp_async_wait_all(Context& c, uint32_t line) {
  cp_async_commit(c);
  cp_async_wait(c, line, 0);
}

static inline void grid_wait(Context& c) { c.has_waited = overlap.has_waited = overlap.block_waits = true; }
static inline void launch_dependents(Context& c) { overlap.block_opens_early |= !c.has_waited; }
static inline void end_of_block() { overlap.opens_late |= overlap.block_waits && !overlap.block_opens_early; }

// ---- atomics: `f` makes the new value of the old one
template <class T, class F> static ALWAYS T atomic(unsigned char* p, F f) {
  const T old = fetch<T>(p);
  store<T>(p, f(old));
  return old;
}
static void fence(Context& c, uint32_t line, int scope) {
  site = line;
  TRACE(trace_fence(c.thread, scope));
}
