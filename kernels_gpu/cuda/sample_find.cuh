// Which token is at a place among a row's, by falling logit and then rising id, without sorting: the token at which the running
// sum of weights passes a target is found 11 bits of the logit at a time. A block of kThreads works on one row.
//
// Weights are integers with 44 bits below the point: sums do not depend on the order of threads, so neither do tokens.
#pragma once
#include "ptx.cuh"

typedef unsigned long long u64;
constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2048;  // of a histogram over 11 bits, or over the ids of a chunk
constexpr int kList = 1024;  // tokens that fit into shared memory

struct Cut {  // tokens up to this one, by falling logit and then rising id
  uint32_t key;
  int id;
};

struct Tokens {  // a whole row (ids null: the id is the place) or a list of some of it
  const float* values;
  const int* ids;
  const uint32_t* allowed;  // a bit for each token, or null
  int n;
};

struct Weights {
  float largest, inverse;  // 1 / temperature
  float bound;  // below it a token weighs nothing
  double temperature, least;  // nor below `least`, which is min_p
  bool is_exact;  // double as on the host after top_k or min_p, else float
  bool is_count;  // 1 each
};

struct Target {
  u64 place;
  double share;  // at least 0: of the sum of all weights, instead of `place`
  bool is_reached;  // the first running sum that is share * sum, not the first above it
};

struct Found {
  Cut cut;
  u64 total;  // 0: nothing weighs anything
};

struct Shared {
  u64 bins[kBins];
  u64 word;
  int index, n_list;
  float maxima[kWarps];
  int places[kWarps];
  float values[kList];
  int ids[kList];
};

DEVICE float infinity() { return __int_as_float(0x7f800000); }  // NVRTC has no INFINITY

// A larger logit has a larger key; -0 and 0 have the same.
DEVICE uint32_t key_of(float v) {
  const uint32_t bits = __float_as_uint(v + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE bool is_kept(Cut cut, uint32_t key, int id) { return key > cut.key || (key == cut.key && id <= cut.id); }

DEVICE float logit_at(const Tokens& tokens, int i) {
  return tokens.allowed && !(tokens.allowed[i >> 5] >> (i & 31) & 1) ? -infinity() : tokens.values[i];
}

DEVICE u64 weight_of(const Weights& w, float v) {
  if (w.is_count) return 1;
  if (v < w.bound) return 0;
  double share;
  if (w.is_exact) {
    share = exp((static_cast<double>(v) - static_cast<double>(w.largest)) / w.temperature);
    if (share < w.least) return 0;
  } else {
    share = expf(__fmul_rn(__fsub_rn(v, w.largest), w.inverse));
  }
  return static_cast<u64>(share * 17592186044416.0);  // 2^44
}

DEVICE u64 warp_sum(u64 v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}

DEVICE bool is_before(float v, int place, float best, int best_place) { return v > best || (v == best && place < best_place); }

// The largest logit and its lowest id, for all threads; id -1 if one is NaN or the largest is infinite.
DEVICE float largest_of(const Tokens& tokens, Shared& s, int* id) {
  float best = -infinity();
  int place = 0x7fffffff;
  bool has_nan = false;
  for (int i = threadIdx.x; i < tokens.n; i += kThreads) {
    const float v = logit_at(tokens, i);
    has_nan |= v != v;
    if (is_before(v, i, best, place)) best = v, place = i;
  }
  for (int o = 16; o; o >>= 1) {
    const float v = __shfl_xor_sync(FULL_WARP, best, o);
    const int i = __shfl_xor_sync(FULL_WARP, place, o);
    if (is_before(v, i, best, place)) best = v, place = i;
  }
  if (lane_id() == 0) s.maxima[threadIdx.x / 32] = best, s.places[threadIdx.x / 32] = place;
  has_nan = __syncthreads_or(has_nan);
  for (int w = 0; w < kWarps; w++)
    if (is_before(s.maxima[w], s.places[w], best, place)) best = s.maxima[w], place = s.places[w];
  *id = has_nan || isinf(best) ? -1 : place;
  __syncthreads();
  return best;
}

DEVICE void clear_bins(Shared& s) {
  for (int b = threadIdx.x; b < kBins; b += kThreads) s.bins[b] = 0;
  __syncthreads();
}

// Shared memory has atomics of 32 bits only (one of 64 is a loop of compare-and-swap), and those of a constant 1 take equal bins
// of a warp together.
DEVICE void add_to_bin(u64& bin, u64 weight, bool is_count) {
  uint32_t* words = reinterpret_cast<uint32_t*>(&bin);
  if (is_count) {
    atomicAdd(words, 1u);
    return;
  }
  const uint32_t low = static_cast<uint32_t>(weight), before = atomicAdd(words, low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before);
  if (high) atomicAdd(words + 1, high);
}

// Bins in order: rising, or falling from the last. Lane l of warp 0 holds the l-th 64th of them.
DEVICE int bin_at(int lane, int j, bool is_rising) {
  const int b = lane * (kBins / 32) + j;
  return is_rising ? b : kBins - 1 - b;
}

// The sum of all bins, for all threads.
DEVICE u64 sum_of_bins(Shared& s) {
  __syncthreads();
  if (threadIdx.x < 32) {
    u64 sum = 0;
    for (int b = threadIdx.x; b < kBins; b += 32) sum += s.bins[b];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) s.word = sum;
  }
  __syncthreads();
  return s.word;
}

// The bin in which the running sum passes `place`, for all threads; what is in front of it is taken from `place`.
DEVICE int find_bin(Shared& s, bool is_rising, u64& place) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = lane_id(), n = kBins / 32;
    u64 sum = 0;
    for (int j = 0; j < n; j++) sum += s.bins[bin_at(lane, (j + lane) & (n - 1), is_rising)];  // rotated: no bank twice
    u64 end = sum;
    for (int o = 1; o < 32; o <<= 1) {
      const u64 other = __shfl_up_sync(FULL_WARP, end, o);
      if (lane >= o) end += other;
    }
    u64 left = place - (end - sum);
    if (end - sum <= place && place < end) {
      int j = 0;
      for (u64 here; here = s.bins[bin_at(lane, j, is_rising)], left >= here; j++) left -= here;
      s.index = bin_at(lane, j, is_rising);
      s.word = left;
    }
  }
  __syncthreads();
  place = s.word;
  const int found = s.index;
  __syncthreads();
  return found;
}

DEVICE u64 place_of(Target target, u64 total) {
  if (target.share < 0.0) return target.place;
  const double wanted = target.share * static_cast<double>(total);
  u64 place = static_cast<u64>(target.is_reached ? ceil(wanted) : wanted);
  if (target.is_reached && place > 0) place--;
  return place < total ? place : total - 1;
}

// Which of the tokens with this key (any key, with any_key) it is, by rising id. `place` counts from the first of them.
// Not inlined, as the compiler would take ten seconds for what is written three times.
__device__ __noinline__ int find_id(const Tokens& tokens, const Weights& w, Cut kept, bool any_key, uint32_t key,
                                    const Target* target, u64& place, u64* total, Shared& s) {
  if (tokens.ids) {  // ties in a list are few: each counts what is in front of it
    for (int i = threadIdx.x; i < tokens.n; i += kThreads) {
      if (key_of(tokens.values[i]) != key || !is_kept(kept, key, tokens.ids[i])) continue;
      u64 front = 0;
      for (int j = 0; j < tokens.n; j++)
        if (key_of(tokens.values[j]) == key && tokens.ids[j] < tokens.ids[i]) front += weight_of(w, tokens.values[j]);
      if (front <= place && place < front + weight_of(w, tokens.values[i])) s.index = tokens.ids[i];
    }
    __syncthreads();
    const int id = s.index;
    __syncthreads();
    return id;
  }
  auto weight_at = [&](int id) -> u64 {
    if (id >= tokens.n) return 0;
    const float v = logit_at(tokens, id);
    const uint32_t own = key_of(v);
    return (any_key || own == key) && is_kept(kept, own, id) ? weight_of(w, v) : 0;
  };
  clear_bins(s);
  for (int chunk = threadIdx.x / 32; chunk * kBins < tokens.n; chunk += kWarps) {
    u64 sum = 0;
    for (int j = lane_id(); j < kBins; j += 32) sum += weight_at(chunk * kBins + j);
    sum = warp_sum(sum);
    if (lane_id() == 0) s.bins[chunk] = sum;
  }
  if (target) {
    *total = sum_of_bins(s);
    if (*total == 0) return 0;
    place = place_of(*target, *total);
  }
  const int chunk = find_bin(s, true, place);
  for (int j = threadIdx.x; j < kBins; j += kThreads) s.bins[j] = weight_at(chunk * kBins + j);
  return chunk * kBins + find_bin(s, true, place);
}

// Put tokens that `kept` keeps, with keys from `least` on, into shared memory in place of the row, if they are at most kList.
__device__ __noinline__ void collect(Tokens& tokens, Cut kept, uint32_t least, Shared& s) {
  if (threadIdx.x == 0) s.n_list = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens.n; i += kThreads) {
    const float v = logit_at(tokens, i);
    const uint32_t key = key_of(v);
    if (key < least || !is_kept(kept, key, i)) continue;
    const int at = atomicAdd(&s.n_list, 1);
    if (at < kList) s.values[at] = v, s.ids[at] = i;
  }
  __syncthreads();
  if (s.n_list <= kList) tokens = {s.values, s.ids, nullptr, s.n_list};
}

// The token at which the running sum of weights passes the target, among those that `kept` keeps. What comes before it in the
// order of logits takes the place of `tokens` as soon as it is known to be few.
__device__ __noinline__ Found find(Tokens& tokens, const Weights& w, Cut kept, Target target, Shared& s) {
  uint32_t prefix = 0;
  u64 place = 0, total = 0;
  const int shifts[4] = {32, 21, 10, 0};
#pragma unroll
  for (int pass = 0; pass < 3; pass++) {
    const int shift = shifts[pass + 1], bits = shifts[pass] - shift;
    clear_bins(s);
    for (int i = threadIdx.x; i < tokens.n; i += kThreads) {
      const float v = logit_at(tokens, i);
      const uint32_t key = key_of(v);
      if ((pass > 0 && key >> shifts[pass] != prefix) || !is_kept(kept, key, tokens.ids ? tokens.ids[i] : i)) continue;
      const u64 weight = weight_of(w, v);
      if (weight) add_to_bin(s.bins[(key >> shift) & ((1u << bits) - 1)], weight, w.is_count);
    }
    if (pass == 0) {
      total = sum_of_bins(s);
      if (total == 0) return {kept, 0};
      place = place_of(target, total);
    }
    prefix = prefix << bits | static_cast<uint32_t>(find_bin(s, false, place));
    if (pass < 2 && !tokens.ids) collect(tokens, kept, prefix << shift, s);
  }
  return {{prefix, find_id(tokens, w, kept, false, prefix, nullptr, place, nullptr, s)}, total};
}
