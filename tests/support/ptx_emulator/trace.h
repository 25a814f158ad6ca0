// What emulated kernels tell of their memory accesses, for `trace.cpp`: races between threads, sectors and bank conflicts.
//
// A thread is its linear number in the block, a site the PTX line of the instruction. Every thread tells of its own accesses, in
// the order in which it makes them, blocks one after another.
#pragma once
#include <stdint.h>

extern "C" {
// Kind: 'r' read, 'w' write, 'a' atomic. Space: 'g' global, the address that of the host; 's' shared, a byte offset in the block's.
// cp.async is an 'r' of global memory and a 'p' (promise) of shared memory when it is asked for, and a 'w' of shared memory
// when a wait_group of the same thread completes it: in between nobody may touch those bytes. ldmatrix is an 'r' of 16 bytes by each lane that passes the address of a row.
void trace_access(uint32_t site, char kind, char space, uint64_t address, uint32_t bytes, int thread);
// Once for each thread that comes to a barrier of the whole block, when it comes or when it goes on.
void trace_block_barrier(int thread, int n_threads_arrived);
// Once for each lane that comes to an instruction for the lanes of `mask`, before it waits. bar.warp.sync orders memory;
// shfl, vote, mma and ldmatrix only bring the lanes together.
void trace_warp_sync(int thread, uint32_t mask, int orders_memory);
void trace_fence(int thread, int scope);  // 0 block, 1 device, 2 system
void trace_begin(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads, uint32_t shared_bytes);
void trace_block(unsigned linear_block);  // the accesses that follow are this block's
void trace_end();

// Forget all launches; what to look for in those that come.
void trace_reset(int races, int transactions);
// The launches since then, as JSON; valid until the next call of any function here.
const char* trace_report();
}
