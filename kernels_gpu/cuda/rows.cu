// Operations on rows: norms, gated activations, sums, and the forms that matmuls read. All are bound by launch latency in
// decode and by memory in prompts, so each makes one pass over its row and writes the form that is asked for.
// Defines: WIDTH (columns, a multiple of 4, of 32 for OUT_A8), THREADS, OUT; rms_norm: BEFORE, N_USED; gated: ACTIVATION, GATED
// (float or __half, of gate and up).
#include "row_output.cuh"
#ifdef ACTIVATION
#include "activation.cuh"
#endif

#define BEFORE_NOTHING 0
#define BEFORE_ADD 1
#define BEFORE_NORM_ADD 2
#define BEFORE_COMBINE 3

constexpr int kChunks = WIDTH / 4;
constexpr int kPer = (kChunks + THREADS - 1) / THREADS;

DEVICE float4 load_chunk(const float* row, int chunk) {
  return chunk < kChunks ? reinterpret_cast<const float4*>(row)[chunk] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

DEVICE float4 load_chunk(const __half* row, int chunk) {
  if (chunk >= kChunks) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const uint2 bits = reinterpret_cast<const uint2*>(row)[chunk];
  const float2 low = __half22float2(bits_as<__half2>(bits.x)), high = __half22float2(bits_as<__half2>(bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

template <class T>
DEVICE const T* row_of(const T* x, int row) { return x + static_cast<long long>(row) * WIDTH; }

DEVICE float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Normalize a row held in registers; weights are in registers too, loaded before the row was there.
template <int kPer>
DEVICE void normalize(float4 (&v)[kPer], const float4 (&w)[kPer], float eps, float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPer; p++) sum += squares_of(v[p]);
  const float factor = 1.0f / sqrtf(block_sum<THREADS>(sum, scratch) / WIDTH + eps);
#pragma unroll
  for (int p = 0; p < kPer; p++) v[p] = scaled(v[p], factor, w[p]);
}

// out = norm(x) * weight. BEFORE_ADD: x + residual takes the place of x and is kept in `sum`. BEFORE_NORM_ADD: x is
// first normalized with weight_before (gemma3's norm behind each part). BEFORE_COMBINE: x has N_USED slots a row, and residual
// plus their sum, weighted by slot_weights [rows, N_USED], takes its place. A block is a row. `sum` may be `residual`.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const float* x, const float* weight, float eps, const float* weight_before, float eps_before,
    const float* slot_weights, const float* residual, float* sum, void* out, float* scales, float* sums) {
  __shared__ float scratch[3][32];
  const int row = blockIdx.x;
  let_next_start();
  float4 v[kPer], w[kPer];
#if BEFORE == BEFORE_NORM_ADD
  float4 first[kPer];
#pragma unroll
  for (int p = 0; p < kPer; p++) first[p] = load_chunk(weight_before, threadIdx.x + p * THREADS);
#endif
#pragma unroll
  for (int p = 0; p < kPer; p++) w[p] = load_chunk(weight, threadIdx.x + p * THREADS);
  wait_for_previous();
#if BEFORE == BEFORE_COMBINE
#pragma unroll
  for (int p = 0; p < kPer; p++) {
    const int chunk = threadIdx.x + p * THREADS;
    v[p] = load_chunk(row_of(residual, row), chunk);
    for (int s = 0; s < N_USED; s++) {
      const float share = slot_weights[row * N_USED + s];
      if (share == 0.0f) continue;  // of padding nobody wrote the slot
      const float4 slot = load_chunk(x + (static_cast<long long>(row) * N_USED + s) * WIDTH, chunk);
      v[p] = plus(v[p], make_float4(share * slot.x, share * slot.y, share * slot.z, share * slot.w));
    }
    if (chunk < kChunks) reinterpret_cast<float4*>(sum)[static_cast<long long>(row) * kChunks + chunk] = v[p];
  }
#else
#pragma unroll
  for (int p = 0; p < kPer; p++) v[p] = load_chunk(row_of(x, row), threadIdx.x + p * THREADS);
#endif
#if BEFORE == BEFORE_NORM_ADD
  normalize(v, first, eps_before, scratch[2]);
#endif
#if BEFORE == BEFORE_ADD || BEFORE == BEFORE_NORM_ADD
#pragma unroll
  for (int p = 0; p < kPer; p++) {
    const int chunk = threadIdx.x + p * THREADS;
    v[p] = plus(v[p], load_chunk(row_of(residual, row), chunk));
    if (chunk < kChunks) reinterpret_cast<float4*>(sum)[static_cast<long long>(row) * kChunks + chunk] = v[p];
  }
#endif
  normalize(v, w, eps, scratch[0]);
  store_row<OUT, THREADS, kChunks>(v, row, out, scales, sums, scratch[1]);
}

// What a lane computes for four columns goes out in the asked form. An h16 row needs its maximum first: one block a row;
// else blocks share a row, grid (blocks, rows).
template <class ValueAt>
DEVICE void map_row(ValueAt value_at, void* out, float* scales, float* sums) {
  const int row = blockIdx.y;
#if OUT == OUT_H16
  __shared__ float scratch[32];
  float4 v[kPer];
#pragma unroll
  for (int p = 0; p < kPer; p++) v[p] = value_at(row, threadIdx.x + p * THREADS);
  store_row<OUT, THREADS, kChunks>(v, row, out, scales, sums, scratch);
#else
  const int chunk = threadIdx.x + blockIdx.x * THREADS;
  const long long first = static_cast<long long>(row) * kChunks;
  const float4 v = value_at(row, chunk);
#if OUT == OUT_A8
  store_a8(v, chunk < kChunks, first, chunk, out, scales, sums);
#else
  if (chunk < kChunks) static_cast<float4*>(out)[first + chunk] = v;
#endif
#endif
}

// out = x[rows[m]], or x[m] without `rows`; a negative row (padding) gives zeros.
extern "C" __global__ void __launch_bounds__(THREADS) copy_rows(const float* x, const int* rows, void* out,
                                                               float* scales, float* sums) {
  let_next_start();
  wait_for_previous();
  map_row(
      [=](int row, int chunk) {
        const int source = rows == nullptr ? row : rows[row];
        return load_chunk(row_of(x, max(source, 0)), source < 0 ? kChunks : chunk);
      },
      out, scales, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS) add(const float* a, const float* b, void* out, float* scales,
                                                         float* sums) {
  let_next_start();
  wait_for_previous();
  map_row(
      [=](int row, int chunk) {
        return plus(load_chunk(row_of(a, row), chunk), load_chunk(row_of(b, row), chunk));
      },
      out, scales, sums);
}

#ifdef ACTIVATION
// out = activation(gate) * up * share.
extern "C" __global__ void __launch_bounds__(THREADS) gated(const GATED* gate, const GATED* up, float share, void* out,
                                                           float* scales, float* sums) {
  let_next_start();
  wait_for_previous();
  map_row(
      [=](int row, int chunk) {
        const float4 g = load_chunk(row_of(gate, row), chunk);
        const float4 u = load_chunk(row_of(up, row), chunk);
        return make_float4(activated(g.x) * u.x * share, activated(g.y) * u.y * share, activated(g.z) * u.z * share,
                           activated(g.w) * u.w * share);
      },
      out, scales, sums);
}
#endif

#ifdef HEAD
// Norm of each head of HEAD columns by itself, a warp a head; grid (ceil(heads / warps), rows). `out` may be x.
extern "C" __global__ void __launch_bounds__(THREADS) head_norm(const float* x, const float* weight, float eps,
                                                               float* out) {
  constexpr int kColumns = (HEAD + 31) / 32;
  const int head = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), row = blockIdx.y;
  if (head >= WIDTH / HEAD) return;
  let_next_start();
  wait_for_previous();
  const float* source = row_of(x, row) + head * HEAD;
  float v[kColumns], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const int column = lane_id() + 32 * i;
    v[i] = column < HEAD ? source[column] : 0.0f;
    sum += v[i] * v[i];
  }
  const float factor = 1.0f / sqrtf(warp_sum(sum) / HEAD + eps);
  float* target = out + static_cast<long long>(row) * WIDTH + head * HEAD;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const int column = lane_id() + 32 * i;
    if (column < HEAD) target[column] = v[i] * factor * weight[column];
  }
}
#endif
