// What the runtime calls of a generated kernel; included behind it.
#pragma once


extern "C" {
// Before every launch: the buffers there are, ascending, and the size of dynamic shared memory; whether it overlaps those before
// it, the mark of the first of them and its own.
void ptx_launch(const Range* ranges, size_t n, uint64_t dynamic_bytes, const unsigned* grid, unsigned n_threads, int overlaps, int oldest, int mark) {
  overlap = Overlap{overlaps != 0, false, false, false, false, uint8_t(oldest), uint8_t(mark)};
  static std::vector<Range> all;
  all.assign(ranges, ranges + n);
  for (const auto& own : module_ranges) {
    auto at = all.begin();
    while (at != all.end() && at->low < own.at) ++at;
    if (own.n_bytes) all.insert(at, Range{own.at, own.at + own.n_bytes, nullptr});
  }
  buffers = all.data(), n_buffers = all.size(), n_dynamic = dynamic_bytes, last_hit = Range{1, 0, nullptr}, site = 0;
  TRACE(trace_begin(kKernelName, grid[0], grid[1], grid[2], n_threads, uint32_t(kStaticBytes + dynamic_bytes)));
}
void ptx_finish() { TRACE(trace_end()); }
int ptx_has_waited() { return overlap.has_waited; }
// Whether the next kernel starts only after those before this one have ended: some block waits for them before it lets it start.
int ptx_opens_late() {
  end_of_block();
  return overlap.opens_late;
}
uint32_t ptx_site() { return site; }
// Called by the runtime when a block begins.
void emulator_poison(unsigned char value) {
  end_of_block();
  overlap.block_waits = overlap.block_opens_early = false;
  memset(static_shared, value, kStaticBytes);
  dynamic_shared = static_cast<unsigned char*>(emulator_dynamic_shared());
  for (Copies& c : copies) c.open.clear(), c.groups.clear();
  n_at_barrier = 0, barrier_generation = 1;
  memset(warp_generation, 0, sizeof warp_generation);
  TRACE(trace_block(emulator_block.x + emulator_grid_size.x * (emulator_block.y + emulator_grid_size.y * emulator_block.z)));
}
void emulator_call(void** args) {
  Context c;
  c.thread = emulator_thread.x + emulator_block_size.x * (emulator_thread.y + emulator_block_size.y * emulator_thread.z);
  c.lane = c.thread & 31;
  c.n_depots = 0;
  c.has_waited = false;
  ptx_entry(c, args);
}
}
