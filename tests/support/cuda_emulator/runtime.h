// What compiled kernels ask of the runtime (runtime.cpp): threads of a block are fibers, and these are where they meet.
#pragma once
struct EmulatorIndex { unsigned x, y, z; };
typedef void (*EmulatorCombine)(unsigned mask, const void* const* in, void* const* out);
extern "C" {
extern EmulatorIndex emulator_thread, emulator_block, emulator_block_size, emulator_grid_size;
// All lanes of `mask` bring `in`; when the last one has come, `combine` fills every lane's `out`. `what` names the call.
void emulator_collective(const char* what, unsigned mask, const void* in, void* out, EmulatorCombine combine);
int emulator_syncthreads(int line, int value);  // how many of the block's threads brought a nonzero value
void* emulator_dynamic_shared();
void emulator_cp_async(void* shared, const void* global, int n_bytes, bool valid);
void emulator_cp_async_commit();
void emulator_cp_async_wait(int n_left);
void emulator_fail(const char* what);  // ends the launch
}
