// From logits to tokens as runtime/sampler.py does it, with the same edits, filters and draw, so the same tokens. Only ids
// and asked logprobs travel back. A block is a row: 128k logits stay in the L2, so a pass over them takes a few
// microseconds, and after top_k a list in shared memory takes their place. Bound by latency.
// Defines: none.
#include "sample_find.cuh"

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

DEVICE int draw(Tokens tokens, const Row& row, float largest, double number, Shared& s) {
  const Cut all = {0, 0x7fffffff};
  Cut kept = all;
  const bool has_top_k = row.top_k > 0 && row.top_k < tokens.n, has_min_p = row.min_p > 0.0;
  Weights w = {largest, static_cast<float>(1.0 / row.temperature), -infinity(), row.temperature, row.min_p, has_top_k || has_min_p, false};
  if (has_top_k) {
    Weights ones = w;
    ones.is_count = true;
    kept = find(tokens, ones, kept, {static_cast<u64>(row.top_k - 1), -1.0, false}, s).cut;
    if (!tokens.ids && row.top_k <= kList) collect(tokens, kept, 0, s);
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
  Tokens some = all, top = all;
  collect(top, find(some, ones, {0, 0x7fffffff}, {static_cast<u64>(n - 1), -1.0, false}, s).cut, 0, s);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int rank = 0;
    for (int j = 0; j < n; j++) rank += is_before(top.values[j], top.ids[j], top.values[i], top.ids[i]);
    top_ids[blockIdx.x * n_top + rank] = top.ids[i];
    top_logits[blockIdx.x * n_top + rank] = top.values[i];
  }
}
