// From logits to tokens as runtime/sampler.py does it, with the same edits, filters and draw, so the same tokens. Only ids
// and asked logprobs travel back. A block is a row: 128k logits stay in the L2, so a pass over them takes a few
// microseconds, and after top_k a list in shared memory takes their place. Bound by latency.
//
// Weights are integers with 44 bits below the point: sums do not depend on the order of threads, so neither do tokens.
// Nothing is sorted. Every filter and the draw ask for the token at which the running sum of weights, over tokens by falling
// logit and then rising id, passes a target: it is found 11 bits of the logit at a time.
// Defines: none.
#include "ptx.cuh"

typedef unsigned long long u64;
constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2048;  // of a histogram over 11 bits, or over the ids of a chunk
constexpr int kList = 1024;  // tokens that fit into shared memory
constexpr int kNotFinite = -1;
constexpr double kGreedyBelow = 1e-5;

struct Edit {  // of one logit: + bias (-inf forbids the token), then the repetition penalty, then - penalty
  int token;
  float bias, repetition, penalty;
};

struct Row {
  int row;  // of the logits; -1: padding
  int top_k;  // 0: off
  int first_edit, n_edits;
  double temperature;  // 0: the largest
  double top_p;  // 1: off
  double min_p;  // 0: off
};

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

// The token at which the running sum of weights passes the target, among those that `kept` keeps.
__device__ __noinline__ Found find(const Tokens& tokens, const Weights& w, Cut kept, Target target, Shared& s) {
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
      if (weight) atomicAdd(&s.bins[(key >> shift) & ((1u << bits) - 1)], weight);
    }
    if (pass == 0) {
      total = sum_of_bins(s);
      if (total == 0) return {kept, 0};
      place = place_of(target, total);
    }
    prefix = prefix << bits | static_cast<uint32_t>(find_bin(s, false, place));
  }
  return {{prefix, find_id(tokens, w, kept, false, prefix, nullptr, place, nullptr, s)}, total};
}

// Put what `kept` keeps, at most kList tokens, into shared memory.
DEVICE Tokens list_of(const Tokens& tokens, Cut kept, Shared& s) {
  if (threadIdx.x == 0) s.n_list = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens.n; i += kThreads) {
    const float v = logit_at(tokens, i);
    if (!is_kept(kept, key_of(v), i)) continue;
    const int at = atomicAdd(&s.n_list, 1);
    s.values[at] = v;
    s.ids[at] = i;
  }
  __syncthreads();
  return {s.values, s.ids, nullptr, s.n_list};
}

DEVICE int draw(Tokens tokens, const Row& row, float largest, double number, Shared& s) {
  const Cut all = {0, 0x7fffffff};
  Cut kept = all;
  const bool has_top_k = row.top_k > 0 && row.top_k < tokens.n, has_min_p = row.min_p > 0.0;
  Weights w = {largest, static_cast<float>(1.0 / row.temperature), -infinity(), row.temperature, row.min_p, has_top_k || has_min_p, false};
  if (has_top_k) {
    Weights ones = w;
    ones.is_count = true;
    kept = find(tokens, ones, kept, {static_cast<u64>(row.top_k - 1), -1.0, false}, s).cut;
    if (row.top_k <= kList) tokens = list_of(tokens, kept, s);
  } else if (has_min_p) {
    w.bound = __fadd_rn(largest, static_cast<float>(row.temperature * log(row.min_p)));
  }
  if (row.top_p < 1.0) {
    const Found found = find(tokens, w, kept, {0, row.top_p, true}, s);
    if (found.total == 0) return kNotFinite;
    kept = found.cut;
  }
  const Target target = {0, number, false};
  if (has_top_k || has_min_p || row.top_p < 1.0) {
    const Found found = find(tokens, w, kept, target, s);
    return found.total == 0 ? kNotFinite : found.cut.id;
  }
  u64 place = 0, total = 0;  // nothing is cut off: by id, as the host does
  const int id = find_id(tokens, w, all, true, 0, &target, place, &total, s);
  return total == 0 ? kNotFinite : id;
}

// tokens[i] = the token drawn from logits[rows[i].row] with numbers[i] in [0, 1), or -1 where the logits are not finite.
// `mask` has a bit for each token that a grammar allows, [n, mask_words]. Edits are made in place and taken back, so that
// what follows sees raw logits: rows with edits must differ. `originals` is for as many logits as there are edits.
extern "C" __global__ void __launch_bounds__(kThreads) sample_rows(
    float* logits, int n_vocab, int stride, const Row* rows, const Edit* edits, float* originals, const uint32_t* mask,
    int mask_words, const double* numbers, int* tokens) {
  __shared__ Shared s;
  wait_for_previous();
  const Row row = rows[blockIdx.x];
  if (row.row < 0) return;
  float* values = logits + static_cast<long long>(row.row) * stride;
  const uint32_t* allowed = mask ? mask + static_cast<long long>(blockIdx.x) * mask_words : nullptr;
  const Tokens all = {values, nullptr, allowed, n_vocab};
  int best;
  float largest = largest_of(all, s, &best);
  const bool is_edited = best >= 0 && row.n_edits;
  if (is_edited) {
    for (int i = threadIdx.x; i < row.n_edits; i += kThreads) {
      const Edit edit = edits[row.first_edit + i];
      const float original = values[edit.token];
      originals[row.first_edit + i] = original;
      float v = __fadd_rn(original, edit.bias);
      v = v > 0.0f ? __fdiv_rn(v, edit.repetition) : __fmul_rn(v, edit.repetition);
      values[edit.token] = __fsub_rn(v, edit.penalty);
    }
    __syncthreads();
    largest = largest_of(all, s, &best);
  }
  int token = best;
  if (best >= 0 && row.temperature >= kGreedyBelow) token = draw(all, row, largest, numbers[blockIdx.x], s);
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
  __syncthreads();
  if (is_edited)
    for (int i = threadIdx.x; i < row.n_edits; i += kThreads) values[edits[row.first_edit + i].token] = originals[row.first_edit + i];
}

struct Logprob {
  float logit, largest;  // of the token; of the row
  double sum;  // of exp(logit - largest)
  int rank;  // 1 + how many are larger
  int padding;
};

// Of raw logits: the token's entry, and the n_top most likely tokens by falling logit, n_top at most kList.
extern "C" __global__ void __launch_bounds__(kThreads) row_logprobs(
    const float* logits, int n_vocab, int stride, const Row* rows, const int* tokens, int n_top, Logprob* out, int* top_ids,
    float* top_logits) {
  __shared__ Shared s;
  wait_for_previous();
  const int row = rows[blockIdx.x].row, token = tokens[blockIdx.x];
  if (row < 0 || token < 0) return;
  const float* values = logits + static_cast<long long>(row) * stride;
  const Tokens all = {values, nullptr, nullptr, n_vocab};
  int best;
  const float largest = largest_of(all, s, &best), own = values[token];
  double sum = 0.0;
  int n_larger = 0;
  for (int i = threadIdx.x; i < n_vocab; i += kThreads) {
    sum += expf(values[i] - largest);
    n_larger += values[i] > own;
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, o);
  n_larger = warp_sum(n_larger);
  double* sums = reinterpret_cast<double*>(s.bins);
  if (lane_id() == 0) sums[threadIdx.x / 32] = sum, s.places[threadIdx.x / 32] = n_larger;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; w++) sum += sums[w], n_larger += s.places[w];
    out[blockIdx.x] = {own, largest, sum, n_larger + 1, 0};
  }
  if (n_top == 0) return;
  __syncthreads();
  const Weights ones = {largest, 1.0f, -infinity(), 1.0, 0.0, false, true};
  const int n = min(n_top, n_vocab);
  const Found found = find(all, ones, {0, 0x7fffffff}, {static_cast<u64>(n - 1), -1.0, false}, s);
  const Tokens top = list_of(all, found.cut, s);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int rank = 0;
    for (int j = 0; j < n; j++) rank += is_before(top.values[j], top.ids[j], top.values[i], top.ids[i]);
    top_ids[blockIdx.x * n_top + rank] = top.ids[i];
    top_logits[blockIdx.x * n_top + rank] = top.values[i];
  }
}

// ---- BLAKE2b (RFC 7693) of three integers, 8 bytes long, as runtime/sample_random.py has it
struct Counter {
  long long seed, index, position;
};

__constant__ u64 kInitial[8] = {0x6a09e667f3bcc908ull, 0xbb67ae8584caa73bull, 0x3c6ef372fe94f82bull, 0xa54ff53a5f1d36f1ull,
                                0x510e527fade682d1ull, 0x9b05688c2b3e6c1full, 0x1f83d9abfb41bd6bull, 0x5be0cd19137e2179ull};
__constant__ unsigned char kWords[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

DEVICE u64 rotated(u64 v, int n) { return v >> n | v << (64 - n); }

DEVICE void mix(u64& a, u64& b, u64& c, u64& d, u64 x, u64 y) {
  a += b + x;
  d = rotated(d ^ a, 32);
  c += d;
  b = rotated(b ^ c, 24);
  a += b + y;
  d = rotated(d ^ a, 16);
  c += d;
  b = rotated(b ^ c, 63);
}

// numbers[step * n + i] = the number in [0, 1) for counters[i] at position + step: a grid of ceil(n * n_steps / 128) blocks.
extern "C" __global__ void __launch_bounds__(128) draw_numbers(const Counter* counters, int n, int n_steps, double* numbers) {
  const int at = blockIdx.x * 128 + threadIdx.x;
  wait_for_previous();
  if (at >= n * n_steps) return;
  const Counter counter = counters[at % n];
  u64 words[16] = {static_cast<u64>(counter.seed), static_cast<u64>(counter.index), static_cast<u64>(counter.position + at / n)};
  u64 v[16];
  for (int i = 0; i < 8; i++) v[i] = v[i + 8] = kInitial[i];
  v[0] ^= 0x01010008ull;  // a digest of 8 bytes, no key
  const u64 first = v[0];
  v[12] ^= 24;  // bytes hashed
  v[14] = ~v[14];  // the last block
  for (int round = 0; round < 12; round++) {
    const unsigned char* m = kWords[round % 10];
    for (int i = 0; i < 4; i++) mix(v[i], v[4 + i], v[8 + i], v[12 + i], words[m[2 * i]], words[m[2 * i + 1]]);
    for (int i = 0; i < 4; i++)
      mix(v[i], v[4 + (i + 1) % 4], v[8 + (i + 2) % 4], v[12 + (i + 3) % 4], words[m[8 + 2 * i]], words[m[9 + 2 * i]]);
  }
  numbers[at] = static_cast<double>((first ^ v[0] ^ v[8]) >> 11) * 1.1102230246251565e-16;  // 2^-53
}

// Between two steps of decoding: what was sampled becomes the input at the next position of its sequence, and goes to the slot
// that each group's page table has for it. slots [n_groups, slot_stride], page_tables [n_groups, table_size] in rows of
// table_stride pages.
extern "C" __global__ void __launch_bounds__(128) advance_step(
    const int* tokens, int n, int* token_ids, int* positions, int* slots, const int* page_tables, int n_groups, int slot_stride,
    int table_size, int table_stride, int block_size) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  wait_for_previous();
  if (i >= n) return;
  const int position = positions[i] + 1;
  token_ids[i] = max(tokens[i], 0);  // after logits that are not finite the host drops what follows
  positions[i] = position;
  for (int g = 0; g < n_groups; g++) {
    const int page = page_tables[static_cast<long long>(g) * table_size + i * table_stride + position / block_size];
    slots[static_cast<long long>(g) * slot_stride + i] = page * block_size + position % block_size;
  }
}
