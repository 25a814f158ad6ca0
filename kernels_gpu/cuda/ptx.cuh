// Every PTX instruction that the kernels use, behind a function with a plain C++ body for the emulator (PYINFER_EMULATE).
// Fragment layouts are those of the PTX ISA, "Matrix fragments for mma"; g = lane / 4, t = lane % 4.
#pragma once
#include "common.cuh"

// ---- loads that go past the L1: weights are read once
DEVICE uint4 load_stream(const uint4* p) {
#ifdef PYINFER_EMULATE
  return *p;
#else
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
#endif
}

DEVICE uint2 load_stream(const uint2* p) {
#ifdef PYINFER_EMULATE
  return *p;
#else
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
#endif
}

DEVICE uint32_t load_stream(const uint32_t* p) {
#ifdef PYINFER_EMULATE
  return *p;
#else
  uint32_t r;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
#endif
}

// ---- loads through the L1 of what is never written while a kernel runs
template <class T>
DEVICE T load_cached(const T* p) {
#ifdef PYINFER_EMULATE
  return *p;
#else
  return __ldg(p);
#endif
}

// What other blocks of this launch have written: past the L1, which does not see them.
DEVICE float4 load_shared_by_blocks(const float4* p) { return __ldcg(p); }

// 2^x to two units in the last place, one instruction; results below 2^-126 are zero.
DEVICE float exp2_approx(float x) {
#ifdef PYINFER_EMULATE
  return exp2f(x);
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#endif
}

#ifndef PYINFER_EMULATE
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// (v & mask) ^ flip in one instruction, which compilers make two of.
DEVICE uint32_t and_xor(uint32_t v, uint32_t mask, uint32_t flip) {
#ifdef PYINFER_EMULATE
  return (v & mask) ^ flip;
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(v), "r"(mask), "r"(flip));
  return r;
#endif
}

// ---- cp.async: 16 bytes from global to shared memory; with !valid zeros are written and the source is not read.
// Before sm_80 the copy happens at once and waiting does nothing.
DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
#ifdef PYINFER_EMULATE
  emulator_cp_async(shared, global, 16, valid);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// The same for 4, 8 or 16 bytes; the smaller ones go through the L1, where neighbours find the rest of their sector.
template <int kBytes>
DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes of cp.async");
#ifdef PYINFER_EMULATE
  emulator_cp_async(shared, global, kBytes, valid);
#elif __CUDA_ARCH__ >= 800
  if (kBytes == 16) cp_async16(shared, global, valid);
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes), "r"(valid ? kBytes : 0) : "memory");
#else
#pragma unroll
  for (int i = 0; i < kBytes / 4; i++)
    static_cast<uint32_t*>(shared)[i] = valid ? static_cast<const uint32_t*>(global)[i] : 0u;
#endif
}

DEVICE void cp_async_commit() {
#ifdef PYINFER_EMULATE
  emulator_cp_async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most kLeft of this thread's latest groups are under way; others see the data after __syncthreads().
template <int kLeft>
DEVICE void cp_async_wait() {
#ifdef PYINFER_EMULATE
  emulator_cp_async_wait(kLeft);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- ldmatrix: 8x8 tiles of 16-bit elements. Lane i passes the address of row i % 8 of tile i / 8 (16 bytes, aligned).
// r[j] of lane l holds elements (l/4, 2*(l%4)) and the next of tile j; transposed: (2*(l%4), l/4) and the row below.
template <bool kTranspose = false>
DEVICE void ldmatrix_x4(uint32_t r[4], const void* row) {
#ifdef PYINFER_EMULATE
  emulator_ldmatrix(r, 4, row, kTranspose);
#else
  if (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

template <bool kTranspose = false>
DEVICE void ldmatrix_x2(uint32_t r[2], const void* row) {
#ifdef PYINFER_EMULATE
  emulator_ldmatrix(r, 2, row, kTranspose);
#else
  if (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
#endif
}

// ---- mma: d += a * b with float32 sums. a is 16 x 16 (row-major), b 16 x 8 (each column contiguous), d 16 x 8.
// a[0]: (g, 2t..), a[1]: (g+8, 2t..), a[2]: (g, 2t+8..), a[3]: (g+8, 2t+8..); b[0]: (2t.., g), b[1]: (2t+8.., g);
// d[0..1]: (g, 2t..), d[2..3]: (g+8, 2t..). Before sm_80 it is two products of 16 x 8 x 8.
DEVICE void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef PYINFER_EMULATE
  emulator_mma_f16(d, a, b);
#elif __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

// The same over bfloat16; sm_80 and later.
DEVICE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef PYINFER_EMULATE
  emulator_mma_bf16(d, a, b);
#elif __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// d += a * b over int8 with int32 sums: a is 16 x 32, b 32 x 8, d 16 x 8.
// a[0]: (g, 4t..), a[1]: (g+8, 4t..), a[2]: (g, 4t+16..), a[3]: (g+8, 4t+16..); b[0]: (4t.., g), b[1]: (4t+16.., g).
DEVICE void mma_s8(int d[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef PYINFER_EMULATE
  emulator_mma_s8(d, a, b);
#elif __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d[2 * (i & 1)]), "+r"(d[2 * (i & 1) + 1]) : "r"(a[i]), "r"(b[i >> 1]));
#endif
}

// ---- programmatic dependent launch (sm_90; Launch.overlap): a kernel may begin while the one before it ends.
DEVICE void wait_for_previous() {
#if !defined(PYINFER_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be started: its blocks take the places that this grid leaves free.
DEVICE void let_next_start() {
#if !defined(PYINFER_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
