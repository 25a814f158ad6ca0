// Accesses that nothing orders, by shadow cells in the manner of FastTrack (Flanagan and Freund, PLDI 2009): for each four bytes the
// last write and up to three reads, each with the clocks of its thread. What orders two accesses:
//   in a block    a barrier of the block between them, or one of the warp (bar.warp.sync) that both lanes were in
//   of two blocks fences and atomics as the PTX memory model has them: a fence, then an atomic releases what came before the fence;
//                 an atomic of the same word that comes later, then a fence acquires it. Barriers of the block pass it on.
#pragma once
#include <algorithm>
#include <map>
#include <memory>
#include <stdint.h>
#include <string.h>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace trace {

struct Access {
  uint64_t block : 20, thread : 10, epoch : 20, fences : 14;    // barriers of the block and fences of the thread before it
  uint64_t warp_epoch : 24, partial : 10, site : 24, atomic : 1, used : 1,  // syncs of the whole warp, and of parts of it
      pending : 1;  // a copy that has been asked for
};
static_assert(sizeof(Access) == 16, "packed");

struct Cell {
  Access write, read, read2, other;  // read2: of another thread than read, another warp if there is one; other: of another block
  uint32_t split;                    // 1 + index of the four cells of its bytes
};

struct Race {
  const char* what;
  char space;
  uint64_t address;
  Access first, second;
  char first_kind, second_kind;
  uint64_t count;
};

struct Release {
  uint32_t epoch;                // accesses before this barrier are out,
  std::vector<uint32_t> fences;  // and of a thread what came before so many of its fences
};

struct Word {  // that blocks meet at with atomics
  std::unordered_map<uint32_t, Release> releases;  // by block
};

struct Acquired {
  uint64_t word;
  unsigned thread;
  uint32_t epoch;
};

class Races {
 public:
  std::vector<Race> found;

  void begin(unsigned n_threads, uint32_t shared_bytes) {
    found.clear(), index_.clear(), pages_.clear(), words_.clear();
    split_.clear();
    threads_.assign(n_threads, Thread());
    shared_.assign((shared_bytes + 3) / 4, Cell());
    block_ = 0;
  }

  void block(unsigned number) {
    block_ = number;
    for (Thread& t : threads_) t = Thread();
    memset(static_cast<void*>(shared_.data()), 0, shared_.size() * sizeof(Cell));
    touched_.clear(), acquired_.clear();
  }

  void block_barrier(unsigned thread) { threads_[thread].epoch++; }

  void warp_sync(unsigned thread, uint32_t mask) {
    const unsigned first = thread / 32 * 32, n = threads_.size() - first;
    const uint32_t all = n >= 32 ? ~0u : (1u << n) - 1;
    Thread& t = threads_[thread];
    if ((mask & all) == all) {
      t.warp_epoch++;
      return;
    }
    t.waits = mask & all;
    for (unsigned l = 0; l < 32; l++)
      if (mask >> l & 1 && threads_[first + l].waits != t.waits) return;
    for (unsigned l = 0; l < 32; l++)
      if (mask >> l & 1) threads_[first + l].partial++, threads_[first + l].waits = 0;
    uint16_t known[32] = {};
    for (unsigned l = 0; l < 32; l++)
      if (mask >> l & 1) {
        for (unsigned k = 0; k < 32; k++) known[k] = std::max(known[k], threads_[first + l].known[k]);
        known[l] = std::max<uint16_t>(known[l], threads_[first + l].partial);
      }
    for (unsigned l = 0; l < 32; l++)
      if (mask >> l & 1) memcpy(threads_[first + l].known, known, sizeof known);
  }

  void fence(unsigned thread) {
    Thread& t = threads_[thread];
    if (t.last_fence != t.epoch || !t.fences) t.fences_before = t.fences, t.last_fence_before = t.last_fence;
    t.last_fence = t.epoch, t.fences++;
    for (const Acquired& a : touched_)
      if (a.thread == thread || a.epoch < t.epoch) acquired_.push_back({a.word, thread, t.epoch});
  }

  void access(uint32_t site, char kind, char space, uint64_t address, uint32_t bytes, unsigned thread) {
    const Thread& t = threads_[thread];
    Access a = {};
    a.block = block_, a.thread = thread, a.epoch = t.epoch, a.fences = t.fences, a.warp_epoch = t.warp_epoch;
    a.partial = t.partial, a.site = site, a.atomic = kind == 'a', a.used = 1, a.pending = kind == 'p';
    const uint64_t end = address + bytes;
    if (space == 's') shared_.resize(std::max<size_t>(shared_.size(), (end + 3) / 4));
    for (uint64_t at = address & ~3ull; at < end; at += 4) {
      const uint64_t from = std::max(at, address), to = std::min(at + 4, end);
      Cell& cell = space == 's' ? shared_[at / 4] : global_cell(at);
      if (to - from == 4 && !cell.split) {
        touch(cell, a, kind, space, at);
        continue;
      }
      if (!cell.split) {
        split_.resize(split_.size() + 4, cell);
        cell.split = split_.size() - 3;
      }
      for (uint64_t byte = from; byte < to; byte++) touch(split_[cell.split - 1 + byte % 4], a, kind, space, byte);
    }
    if (kind == 'a' && space == 'g') atomic(address, thread);
  }

 private:
  struct Thread {
    uint32_t epoch = 0, warp_epoch = 0, fences = 0, last_fence = 0, fences_before = 0, last_fence_before = 0, waits = 0;
    uint16_t partial = 0, known[32] = {};  // syncs of parts of the warp: own ones, and those of other lanes that came before
  };

  std::vector<Thread> threads_;
  std::vector<Cell> shared_, split_;
  std::unordered_map<uint64_t, std::unique_ptr<Cell[]>> pages_;
  std::unordered_map<uint64_t, Word> words_;
  std::vector<Acquired> touched_, acquired_;  // by this block: words that it changed atomically, and those that a fence has followed
  std::map<std::tuple<uint32_t, uint32_t, char, char, const char*>, size_t> index_;
  uint32_t block_ = 0;
  uint64_t last_page_ = ~0ull;
  Cell* last_cells_ = nullptr;

  Cell& global_cell(uint64_t at) {
    const uint64_t page = at >> 12;
    if (page != last_page_ || pages_.empty()) {
      auto& cells = pages_[page];
      if (!cells) cells.reset(new Cell[1024]());
      last_page_ = page, last_cells_ = cells.get();
    }
    return last_cells_[(at & 4095) / 4];
  }

  // What this atomic lets others know, and that its thread now may know of those before it.
  void atomic(uint64_t word, unsigned thread) {
    const Thread& self = threads_[thread];
    Release r = {0, std::vector<uint32_t>(threads_.size(), 0)};
    bool any = false;
    for (unsigned u = 0; u < threads_.size(); u++) {
      const Thread& t = threads_[u];
      const bool all = u == thread || t.last_fence < self.epoch;
      const uint32_t fences = all ? t.fences : t.fences_before;
      if (!fences) continue;
      any = true;
      r.fences[u] = fences;
      r.epoch = std::max(r.epoch, all ? t.last_fence : t.last_fence_before);
    }
    if (any) words_[word].releases[block_] = r;
    for (const Acquired& a : touched_)
      if (a.word == word && a.thread == thread && a.epoch == self.epoch) return;
    touched_.push_back({word, thread, self.epoch});
  }

  bool knows(const Acquired& a, unsigned thread) const {
    return a.thread == thread || a.epoch < threads_[thread].epoch;
  }

  // Whether `before` is ordered before what `now`'s thread does now.
  bool ordered(const Access& before, const Access& now, uint64_t address) const {
    if (before.block != now.block) {
      if (before.atomic)  // the same word was changed atomically by this block since: later in the order of its changes
        for (const Acquired& a : touched_)
          if (a.word == address && knows(a, now.thread)) return true;
      for (const Acquired& a : acquired_) {
        if (!knows(a, now.thread)) continue;
        const auto word = words_.find(a.word);
        if (word == words_.end()) continue;
        const auto r = word->second.releases.find(before.block);
        if (r == word->second.releases.end()) continue;
        if (before.epoch < r->second.epoch || before.fences < r->second.fences[before.thread]) return true;
      }
      return false;
    }
    if (before.thread == now.thread || before.epoch < now.epoch) return true;
    if (before.thread / 32 != now.thread / 32) return false;
    return before.warp_epoch < now.warp_epoch || before.partial < threads_[now.thread].known[before.thread % 32];
  }

  void report(const char* what, char space, uint64_t address, const Access& a, char a_kind, const Access& b, char b_kind) {
    const auto key = std::make_tuple(uint32_t(a.site), uint32_t(b.site), a_kind, b_kind, what);
    const auto old = index_.find(key);
    if (old != index_.end()) {
      found[old->second].count++;
      return;
    }
    index_[key] = found.size();
    found.push_back({what, space, address, a, b, a_kind, b_kind, 1});
  }

  void touch(Cell& cell, const Access& now, char kind, char space, uint64_t address) {
    const auto check = [&](const Access& before, char before_kind) {
      if (before.used && !ordered(before, now, address)) report("race", space, address, before, before_kind, now, kind);
    };
    if (cell.write.pending) {
      if (kind == 'w' && cell.write.thread == now.thread && cell.write.site == now.site) cell.write.pending = 0;
      else report("race", space, address, cell.write, 'p', now, kind);
    }
    if (!(kind == 'a' && cell.write.atomic)) check(cell.write, cell.write.atomic ? 'a' : 'w');
    if (kind == 'r') {
      if (space == 's' && !cell.write.used) report("uninitialised", space, address, now, 'r', now, 'r');
      add_read(cell, now);
      return;
    }
    check(cell.read, 'r'), check(cell.read2, 'r'), check(cell.other, 'r');
    cell.write = now;
    cell.read = cell.read2 = cell.other = Access();
  }

  static void add_read(Cell& cell, const Access& now) {
    if (cell.read.used && cell.read.block != now.block) {
      cell.other = cell.read;
      cell.read2 = Access();
    } else if (cell.read.used && cell.read.thread != now.thread) {
      const bool keeps = cell.read2.used && cell.read2.epoch == now.epoch && cell.read2.thread / 32 != now.thread / 32 &&
                         cell.read.thread / 32 == now.thread / 32;
      if (!keeps) cell.read2 = cell.read;
    }
    cell.read = now;
  }
};

}  // namespace trace
