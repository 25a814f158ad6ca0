// Runs a kernel's blocks one after another, the threads of a block as fibers. A thread runs until it meets others: at a
// shuffle, a barrier or an mma. So what is not synchronized is seen, in ascending or descending order of threads.
//
// Found and reported: lanes that meet in different calls or with different masks, threads that left before a barrier,
// deadlocks, accesses past a buffer's ends (guard pages; canaries where the page's slack lies), misaligned accesses,
// shared memory and buffers read before they are written (poisoned with 0xff), data of cp.async read before it is waited for.
#include "runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace {

const size_t kPage = 4096, kStack = 256 << 10, kMaxThreads = 1024, kMaxShared = 256 << 10;
const unsigned char kCanary = 0xa5, kPoison = 0xff;

struct Copy { void* shared; const void* global; int n_bytes; bool valid; };
enum State { kRunnable, kAtBarrier, kInWarp, kDone };

struct Fiber {
  State state;
  unsigned lane, warp;
  EmulatorIndex index;
  const char* what;  // of the collective it waits in
  unsigned mask;
  const void* in;
  void* out;
  EmulatorCombine combine;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t context;
#endif
};

struct Warp { unsigned waiting, done; };
struct Allocation { unsigned char* map; size_t map_bytes; unsigned char* data; size_t n_bytes; };

std::vector<Allocation> allocations;
Fiber* fibers;
unsigned char* stacks;
unsigned char* shared_end;  // dynamic shared memory ends here, at a guard page
size_t shared_bytes;
std::vector<Warp> warps;
Fiber* current;
unsigned n_threads, n_at_barrier, n_done, barrier_sum;
int barrier_line, barrier_result;
char message[512];
sigjmp_buf launch_exit;
bool launching;
void (*kernel_call)(void**);
void** kernel_args;

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
void* scheduler_sp;
void to_scheduler() { emulator_switch(&current->sp, scheduler_sp); }
void to_fiber(Fiber* f) { emulator_switch(&scheduler_sp, f->sp); }
#else
ucontext_t scheduler_context;
void to_scheduler() { swapcontext(&current->context, &scheduler_context); }
void to_fiber(Fiber* f) { swapcontext(&scheduler_context, &f->context); }
#endif

void fail_in_warp(const char* problem) {
  snprintf(message, sizeof message, "%s in %s", problem, current->what);
  emulator_fail(nullptr);
}

void leave_warp_check() {
  Warp& w = warps[current->warp];
  w.done |= 1u << current->lane;
  for (unsigned l = 0; l < 32 && current->warp * 32 + l < n_threads; l++) {
    Fiber& other = fibers[current->warp * 32 + l];
    if (other.state == kInWarp && (other.mask >> current->lane & 1)) {
      current->what = other.what;
      fail_in_warp("a lane has left the kernel and others wait for it");
    }
  }
  if (n_at_barrier) emulator_fail("a thread has left the kernel and others wait for it in __syncthreads");
}

void fiber_main() {
  kernel_call(kernel_args);
  leave_warp_check();
  current->state = kDone;
  n_done++;
  to_scheduler();
  abort();
}

void start_fiber(unsigned i) {
  Fiber& f = fibers[i];
  unsigned char* top = stacks + (i + 1) * (kStack + kPage);
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // a return address that nobody uses; keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int r = 0; r < 6; r++) *--sp = nullptr;
  f.sp = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = top - kStack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

void make_memory() {
  if (fibers) return;
  fibers = new Fiber[kMaxThreads]();
  const size_t n_bytes = kMaxThreads * (kStack + kPage);
  stacks = static_cast<unsigned char*>(
      mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (size_t i = 0; i < kMaxThreads; i++) mprotect(stacks + i * (kStack + kPage), kPage, PROT_NONE);
  unsigned char* s = static_cast<unsigned char*>(
      mmap(nullptr, kMaxShared + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(s, kPage, PROT_NONE);
  shared_end = s + kPage + kMaxShared;
  mprotect(shared_end, kPage, PROT_NONE);
}

void on_signal(int number, siginfo_t* info, void*) {
  if (!launching) {
    signal(number, SIG_DFL);
    return;
  }
  if (number == SIGILL || number == SIGTRAP)
    snprintf(message, sizeof message, "a misaligned access, an index out of an array's bounds or a shift by too much");
  else if (number == SIGFPE)
    snprintf(message, sizeof message, "an integer division by zero");
  else {
    const unsigned char* at = static_cast<unsigned char*>(info->si_addr);
    const Allocation* nearest = nullptr;
    long best = 1 << 20;
    for (const Allocation& a : allocations) {
      long off = at < a.data ? a.data - at : at >= a.data + a.n_bytes ? at - (a.data + a.n_bytes) : 0;
      if (off < best) { best = off; nearest = &a; }
    }
    if (at >= shared_end && at < shared_end + kPage)  // first: a buffer may lie close by
      snprintf(message, sizeof message, "an access at byte %ld of %zu bytes of dynamic shared memory", long(at - (shared_end - shared_bytes)), shared_bytes);
    else if (nearest)
      snprintf(message, sizeof message, "an access at byte %ld of a buffer of %zu bytes", long(at - nearest->data), nearest->n_bytes);
    else
      snprintf(message, sizeof message, "an access at address %p, near no buffer (or a misaligned one)", info->si_addr);
  }
  emulator_fail(nullptr);
}

void run_block(void (*poison)(unsigned char), bool descending) {
  poison(kPoison);
  memset(shared_end - shared_bytes, kPoison, shared_bytes);
  warps.assign((n_threads + 31) / 32, Warp{0, 0});
  n_at_barrier = n_done = barrier_sum = 0;
  const EmulatorIndex& d = emulator_block_size;
  for (unsigned i = 0; i < n_threads; i++) {
    Fiber& f = fibers[i];
    f.state = kRunnable;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.index = EmulatorIndex{i % d.x, i / d.x % d.y, i / (d.x * d.y)};
    f.groups.clear();
    f.open.clear();
    start_fiber(i);
  }
  while (n_done < n_threads) {
    bool moved = false;
    for (unsigned k = 0; k < n_threads; k++) {
      Fiber& f = fibers[descending ? n_threads - 1 - k : k];
      if (f.state != kRunnable) continue;
      moved = true;
      current = &f;
      emulator_thread = f.index;
      to_fiber(&f);
    }
    if (!moved) {
      for (unsigned i = 0; i < n_threads; i++)
        if (fibers[i].state == kInWarp) {
          current = &fibers[i];
          emulator_thread = current->index;
          snprintf(message, sizeof message, "a deadlock: this lane waits in %s (mask %08x), others at a barrier or elsewhere", current->what, current->mask);
          emulator_fail(nullptr);
        }
      emulator_fail("a deadlock: some threads wait in __syncthreads and the others do not come");
    }
  }
}

}  // namespace

extern "C" {

EmulatorIndex emulator_thread, emulator_block, emulator_block_size, emulator_grid_size;

void emulator_fail(const char* what) {
  if (what) snprintf(message, sizeof message, "%s", what);
  siglongjmp(launch_exit, 1);
}

void emulator_collective(const char* what, unsigned mask, const void* in, void* out, EmulatorCombine combine) {
  Fiber* self = current;
  Warp& w = warps[self->warp];
  self->what = what;
  if (n_threads < (self->warp + 1) * 32) {
    const unsigned present = (1u << (n_threads & 31)) - 1;
    if (mask & ~present) fail_in_warp("the mask names lanes that the block does not have");
  }
  if (!(mask >> self->lane & 1)) fail_in_warp("a lane is not in its own mask");
  if (mask & w.done) fail_in_warp("the mask names a lane that has left the kernel");
  self->mask = mask, self->in = in, self->out = out, self->combine = combine;
  w.waiting |= 1u << self->lane;
  const unsigned base = self->warp * 32;
  for (unsigned l = 0; l < 32; l++)
    if ((w.waiting & mask) >> l & 1) {
      const Fiber& other = fibers[base + l];
      if (other.mask != mask) fail_in_warp("lanes came with different masks");
      if (other.combine != combine || strcmp(other.what, what)) {
        snprintf(message, sizeof message, "lanes of a warp meet in different calls: %s and %s", what, other.what);
        emulator_fail(nullptr);
      }
    }
  if ((w.waiting & mask) != mask) {
    self->state = kInWarp;
    to_scheduler();
    return;
  }
  const void* ins[32] = {};
  void* outs[32] = {};
  for (unsigned l = 0; l < 32; l++)
    if (mask >> l & 1) {
      ins[l] = fibers[base + l].in;
      outs[l] = fibers[base + l].out;
      fibers[base + l].state = kRunnable;
    }
  w.waiting &= ~mask;
  if (combine) combine(mask, ins, outs);
}

int emulator_syncthreads(int line, int value) {
  if (n_done) emulator_fail("__syncthreads after a thread of the block has left the kernel");
  if (n_at_barrier && barrier_line != line) emulator_fail("threads of a block meet in different __syncthreads");
  barrier_line = line;
  barrier_sum += value != 0;
  if (++n_at_barrier < n_threads) {
    current->state = kAtBarrier;
    to_scheduler();
    return barrier_result;
  }
  for (unsigned i = 0; i < n_threads; i++) fibers[i].state = kRunnable;
  barrier_result = barrier_sum;
  n_at_barrier = barrier_sum = 0;
  // the last to come must not run ahead to the next barrier and change barrier_result: others read it first
  to_scheduler();
  return barrier_result;
}

void* emulator_dynamic_shared() { return shared_end - shared_bytes; }

void emulator_cp_async(void* shared, const void* global, int n_bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % n_bytes || (valid && reinterpret_cast<uintptr_t>(global) % n_bytes))
    emulator_fail("a misaligned cp.async");
  if (valid) {
    volatile unsigned char first = *static_cast<const unsigned char*>(global);  // faults here, where it is asked for
    (void)first;
  }
  memset(shared, kPoison, n_bytes);
  current->open.push_back(Copy{shared, global, n_bytes, valid});
}

void emulator_cp_async_commit() {
  current->groups.push_back(current->open);
  current->open.clear();
}

void emulator_cp_async_wait(int n_left) {
  auto& groups = current->groups;
  while (int(groups.size()) > n_left) {
    for (const Copy& c : groups.front())
      if (c.valid) memcpy(c.shared, c.global, c.n_bytes);
      else memset(c.shared, 0, c.n_bytes);
    groups.erase(groups.begin());
  }
}

void* emulator_alloc(size_t n_bytes) {
  const size_t rounded = (n_bytes + 15) / 16 * 16, body = (rounded + kPage - 1) / kPage * kPage;
  unsigned char* map = static_cast<unsigned char*>(
      mmap(nullptr, body + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map == MAP_FAILED) return nullptr;
  mprotect(map, kPage, PROT_NONE);
  mprotect(map + kPage + body, kPage, PROT_NONE);
  unsigned char* data = map + kPage + body - rounded;
  memset(map + kPage, kCanary, body);
  memset(data, kPoison, n_bytes);
  allocations.push_back(Allocation{map, body + 2 * kPage, data, n_bytes});
  return data;
}

void emulator_free(void* data) {
  for (size_t i = 0; i < allocations.size(); i++)
    if (allocations[i].data == data) {
      munmap(allocations[i].map, allocations[i].map_bytes);
      allocations.erase(allocations.begin() + i);
      return;
    }
}

// The first byte beside a buffer that was overwritten, as a message; null when all are whole. Puts the canaries back.
const char* emulator_check_canaries() {
  const char* problem = nullptr;
  for (const Allocation& a : allocations) {
    unsigned char* const page_end = a.map + a.map_bytes - kPage;
    unsigned char* const start = a.map + kPage == a.data ? a.data + a.n_bytes : a.map + kPage;
    for (unsigned char* p = start; p < page_end; p = p + 1 == a.data ? a.data + a.n_bytes : p + 1)
      if (*p != kCanary) {
        if (!problem)
          snprintf(message, sizeof message, "a write at byte %ld of a buffer of %zu bytes", long(p - a.data), a.n_bytes);
        problem = message;
        *p = kCanary;
      }
  }
  return problem;
}

// Run one launch; null, or what went wrong and where.
const char* emulator_launch(void (*call)(void**), void (*poison)(unsigned char), void** args, const unsigned* grid,
                            const unsigned* block, size_t n_shared, int descending) {
  static unsigned char signal_stack[64 << 10];
  static char where[768];
  make_memory();
  kernel_call = call, kernel_args = args;
  n_threads = block[0] * block[1] * block[2];
  shared_bytes = (n_shared + 15) / 16 * 16;
  if (n_threads == 0 || n_threads > kMaxThreads || shared_bytes > kMaxShared) return "a block that is too large";
  emulator_block_size = EmulatorIndex{block[0], block[1], block[2]};
  emulator_grid_size = EmulatorIndex{grid[0], grid[1], grid[2]};
  const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
  struct sigaction action = {}, old[5];
  stack_t stack = {}, old_stack;
  stack.ss_sp = signal_stack, stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 5; i++) sigaction(signals[i], &action, &old[i]);
  launching = true;
  const char* problem = nullptr;
  if (sigsetjmp(launch_exit, 1) == 0) {
    const unsigned long long n_blocks = (unsigned long long)grid[0] * grid[1] * grid[2];
    for (unsigned long long k = 0; k < n_blocks; k++) {
      const unsigned long long b = descending ? n_blocks - 1 - k : k;
      emulator_block = EmulatorIndex{unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
      run_block(poison, descending != 0);
    }
    problem = emulator_check_canaries();
    if (problem) snprintf(where, sizeof where, "%s", problem);
  } else {
    snprintf(where, sizeof where, "%s; block (%u, %u, %u), thread (%u, %u, %u)", message, emulator_block.x, emulator_block.y,
             emulator_block.z, emulator_thread.x, emulator_thread.y, emulator_thread.z);
    problem = where;
  }
  launching = false;
  for (int i = 0; i < 5; i++) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  return problem ? where : nullptr;
}
}
