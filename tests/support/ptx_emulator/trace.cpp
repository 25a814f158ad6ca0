// The accesses of emulated kernels: who races with whom (trace_races.h), and what each instruction costs the memory.
//
// Lanes of a warp make one request together: those that come to an instruction for the n-th time since the last instruction that
// brings lanes together. Global memory answers in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes and answers a warp
// in one pass where no bank has two words; 8 bytes a lane go by half warps, 16 bytes by quarters (as CUTLASS counts them).
#include "trace.h"

#include <algorithm>
#include <stdarg.h>
#include <stdio.h>

#include "trace_races.h"

namespace {

struct Group {
  uint32_t lanes = 0, bytes = 0;
  uint64_t address[32];
};

struct Site {
  uint32_t site;
  char kind, space;
  uint64_t requests = 0, lanes = 0, bytes = 0, used = 0, sectors = 0, ideal_sectors = 0, passes = 0, ideal_passes = 0;
};

struct Count {
  uint64_t since;
  uint32_t n;
};

struct KernelTrace {
  std::string name;
  unsigned grid[3], threads;
  std::vector<trace::Race> races;
  std::vector<Site> sites;
};

std::vector<KernelTrace> launches;
trace::Races races;
std::vector<Site> sites;
std::unordered_map<uint64_t, uint32_t> site_index;  // by site, kind and space
std::vector<std::vector<Count>> counts;             // [thread][site]
std::vector<uint64_t> together;                     // of each thread: instructions that brought lanes together
std::unordered_map<uint64_t, Group> groups[32];     // [warp], open requests by site, `together` and turn
bool finds_races = true, counts_requests = true, is_open = false;
std::string text;

int distinct(uint64_t* values, int n) {
  std::sort(values, values + n);
  return int(std::unique(values, values + n) - values);
}

void count_global(Site& s, const Group& g) {
  uint64_t sectors[32 * 2], starts[32];
  int n_sectors = 0, n = 0;
  for (int l = 0; l < 32; l++)
    if (g.lanes >> l & 1) {
      starts[n++] = g.address[l];
      for (uint64_t at = g.address[l] / 32; at <= (g.address[l] + g.bytes - 1) / 32; at++) sectors[n_sectors++] = at;
    }
  s.sectors += distinct(sectors, n_sectors);
  std::sort(starts, starts + n);
  uint64_t used = 0, end = 0;
  for (int i = 0; i < n; i++) {
    const uint64_t from = std::max(starts[i], end), to = starts[i] + g.bytes;
    if (to > from) used += to - from, end = to;
  }
  s.used += used;
  s.ideal_sectors += (used + 31) / 32;
}

void count_shared(Site& s, const Group& g) {
  const int at_once = g.bytes <= 4 ? 32 : g.bytes == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += at_once) {
    uint64_t words[32];
    int n = 0, in_bank[32] = {}, worst = 0;
    for (int l = first; l < first + at_once; l++)
      if (g.lanes >> l & 1)
        for (uint64_t w = g.address[l] / 4; w <= (g.address[l] + g.bytes - 1) / 4; w++) words[n++] = w;
    if (n == 0) continue;
    if (s.kind != 'a') n = distinct(words, n);  // atomics of one word take turns
    for (int i = 0; i < n; i++) worst = std::max(worst, ++in_bank[words[i] % 32]);
    s.passes += worst;
    s.ideal_passes++;
    s.used += 4 * n;
  }
}

void close_group(uint32_t site, const Group& g) {
  Site& s = sites[site];
  s.requests++;
  s.lanes += __builtin_popcount(g.lanes);
  s.bytes += uint64_t(__builtin_popcount(g.lanes)) * g.bytes;
  if (s.space == 'g') count_global(s, g);
  else count_shared(s, g);
}

void close_groups() {
  for (auto& warp : groups) {
    for (const auto& [key, group] : warp) close_group(key >> 44, group);
    warp.clear();
  }
}

void add_to_group(uint32_t number, char kind, char space, uint64_t address, uint32_t bytes, int thread) {
  const uint64_t name = uint64_t(number) << 16 | uint64_t(kind) << 8 | uint64_t(space);
  auto [place, is_new] = site_index.try_emplace(name, sites.size());
  if (is_new) {
    Site s;
    s.site = number, s.kind = kind, s.space = space;
    sites.push_back(s);
  }
  const uint32_t site = place->second;
  auto& mine = counts[thread];
  if (mine.size() <= site) mine.resize(sites.size(), Count{~0ull, 0});
  Count& count = mine[site];
  if (count.since != together[thread]) count = {together[thread], 0};
  const uint64_t key = uint64_t(site) << 44 | (together[thread] & 0xffffff) << 20 | (count.n++ & 0xfffff);
  auto& warp = groups[thread / 32];
  Group& g = warp[key];
  g.lanes |= 1u << thread % 32;
  g.bytes = std::max(g.bytes, bytes);
  g.address[thread % 32] = address;
  if (g.lanes == ~0u) {
    close_group(site, g);
    warp.erase(key);
  }
}

void append(const char* format, ...) __attribute__((format(printf, 1, 2)));
void append(const char* format, ...) {
  char buffer[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(buffer, sizeof buffer, format, list);
  va_end(list);
  text += buffer;
}

void append_access(const char* name, const trace::Access& a, char kind) {
  append("\"%s\": {\"site\": %u, \"kind\": \"%c\", \"block\": %u, \"thread\": %u}", name, unsigned(a.site), kind, unsigned(a.block),
         unsigned(a.thread));
}

}  // namespace

extern "C" {

void trace_access(uint32_t site, char kind, char space, uint64_t address, uint32_t bytes, int thread) {
  if (finds_races) races.access(site, kind, space, address, bytes, thread);
  if (counts_requests && kind != 'p') add_to_group(site, kind, space, address, bytes, thread);
}

void trace_block_barrier(int thread, int) {
  if (finds_races) races.block_barrier(thread);
  together[thread]++;
}

void trace_warp_sync(int thread, uint32_t mask, int orders_memory) {
  if (finds_races && orders_memory) races.warp_sync(thread, mask);
  together[thread]++;
}

void trace_fence(int thread, int scope) {
  if (finds_races && scope > 0) races.fence(thread);
}

void trace_begin(const char* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned threads, uint32_t shared_bytes) {
  is_open = true;
  launches.push_back({kernel, {gx, gy, gz}, threads, {}, {}});
  sites.clear(), site_index.clear();
  counts.assign(threads, {});
  together.assign(threads, 0);
  for (auto& warp : groups) warp.clear();
  races.begin(threads, shared_bytes);
}

void trace_block(unsigned linear_block) {
  close_groups();
  for (auto& mine : counts) mine.clear();
  std::fill(together.begin(), together.end(), 0);
  races.block(linear_block);
}

void trace_end() {
  if (!is_open) return;
  is_open = false;
  close_groups();
  launches.back().races = races.found;
  launches.back().sites = sites;
  races.begin(0, 0);
}

void trace_reset(int with_races, int with_transactions) {
  finds_races = with_races, counts_requests = with_transactions, is_open = false;
  launches.clear();
}

const char* trace_report() {
  text = "[";
  for (const KernelTrace& k : launches) {
    append("%s{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"races\": [", &k == &launches[0] ? "" : ",\n",
           k.name.c_str(), k.grid[0], k.grid[1], k.grid[2], k.threads);
    for (const trace::Race& r : k.races) {
      append("%s{\"what\": \"%s\", \"space\": \"%c\", \"address\": %llu, \"count\": %llu, ", &r == &k.races[0] ? "" : ", ", r.what,
             r.space, (unsigned long long)r.address, (unsigned long long)r.count);
      append_access("first", r.first, r.first_kind);
      text += ", ";
      append_access("second", r.second, r.second_kind);
      text += "}";
    }
    text += "], \"sites\": [";
    for (const Site& s : k.sites) {
      append("%s{\"site\": %u, \"kind\": \"%c\", \"space\": \"%c\", \"requests\": %llu, \"lanes\": %llu, \"bytes\": %llu, ",
             &s == &k.sites[0] ? "" : ", ", s.site, s.kind, s.space, (unsigned long long)s.requests, (unsigned long long)s.lanes,
             (unsigned long long)s.bytes);
      append("\"used\": %llu, \"sectors\": %llu, \"ideal_sectors\": %llu, \"passes\": %llu, \"ideal_passes\": %llu}",
             (unsigned long long)s.used, (unsigned long long)s.sectors, (unsigned long long)s.ideal_sectors,
             (unsigned long long)s.passes, (unsigned long long)s.ideal_passes);
    }
    text += "]}";
  }
  text += "]";
  return text.c_str();
}
}
