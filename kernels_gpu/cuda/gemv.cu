// out[t, n] = sum_k x[t, k] * w[n, k] + bias[n] + residual[t, n] for 1 to 8 rows of x: decoding. Bound by the memory's bandwidth
// for matrices above about 20 MB and by latency below, so everything here is about bytes in flight.
//
// A warp owns 32 / LANES * ROWS rows of w; LANES lanes go along a row together, 16 bytes of codes each. Every lane asks for
// UNROLL * ROWS of these before it uses the first. SPLIT warps share the same rows and add their sums in a fixed order. The
// order of additions depends on LANES and SPLIT only, so a row of x gives the same numbers whatever comes with it.
//
// Up to three matrices that read the same x (q, k, v; gate, up) go in one launch; blocks are dealt out to them in order.
// With Launch.overlap the first blocks bring their codes into the L2 while the kernel before is still at work on x.
//
// Defines: TYPE0..2 (a struct of weights.cuh), SEGMENTS, TOKENS, ROWS, LANES, SPLIT, WARPS (a block), UNROLL,
// MIN_BLOCKS (on a multiprocessor: limits registers), RAGGED (float types: columns are no multiple of a step).
#include "weights.cuh"

constexpr int kSubgroups = 32 / LANES;
constexpr int kWarpRows = kSubgroups * ROWS;
constexpr int kBlockRows = WARPS / SPLIT * kWarpRows;
constexpr int kStride = LANES * SPLIT;  // steps between those of one lane
constexpr int kOutputs = kWarpRows * TOKENS;
constexpr int kOutputsOfThread = (kOutputs + 32 * SPLIT - 1) / (32 * SPLIT);
static_assert(WARPS % SPLIT == 0 && (LANES & (LANES - 1)) == 0 && LANES <= 32, "whole groups of warps and lanes");

struct Segment {
  const void* w;
  float* out;         // [TOKENS, n]
  const float* bias;  // [n] or null
  int n;
};

// x as the type of the weights wants it: int8 with a scale and scale * sum(codes) of 32 columns, or float32.
struct Input {
  const void* rows;
  const float *scales, *sums;
  int columns;
};

// One step of one row of x.
template <class T>
struct InputStep {
  int q[T::kWords];
  float scale, sum;
  int halves[2];

  DEVICE InputStep(const Input& x, int token, int step) {
    const int at = token * x.columns + step * T::kColumns;
    const uint4* codes = reinterpret_cast<const uint4*>(static_cast<const int8_t*>(x.rows) + at);
#pragma unroll
    for (int i = 0; i < T::kWords / 4; i++) {
      const uint4 v = codes[i];
#pragma unroll
      for (int j = 0; j < 4; j++) q[4 * i + j] = word_of(v, j);
    }
    scale = x.scales[at / 32];
    if constexpr (T::kHalves == 1 && T::kHasMinimum) sum = x.sums[at / 32];
    if constexpr (T::kHalves == 2 && T::kHasMinimum) {
      const int ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
      halves[0] = dot16(q, ones);
      halves[1] = dot16(q + 4, ones);
    }
  }
};

template <class T>
DEVICE void add_product(float& sum, const int* q, const Factors& f, const InputStep<T>& x) {
  if constexpr (T::kHalves == 1) {
    int dot = dot16(q, x.q);
    if constexpr (T::kWords == 8) dot += dot16(q + 4, x.q + 4);
    sum = fmaf(x.scale * (f.d * f.scale[0]), static_cast<float>(dot), sum);
    if constexpr (T::kHasMinimum) sum = fmaf(f.low * f.minimum[0], x.sum, sum);
  } else {
    const float dot = f.scale[0] * dot16(q, x.q) + f.scale[1] * dot16(q + 4, x.q + 4);
    if constexpr (T::kHasMinimum) {
      const float low = f.low * (f.minimum[0] * x.halves[0] + f.minimum[1] * x.halves[1]);
      sum = fmaf(x.scale, fmaf(f.d, dot, low), sum);
    } else {
      sum = fmaf(x.scale * f.d, dot, sum);
    }
  }
}

template <class T>
DEVICE void multiply_int8(const typename T::Tile* tiles, const Input& x, int step, float (*sums)[ROWS]) {
  int q[ROWS][T::kWords];
  Factors f[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    T::unpack(tiles[r], q[r]);
    f[r] = T::factors(tiles[r], step);
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const InputStep<T> in(x, t, step);
#pragma unroll
    for (int r = 0; r < ROWS; r++) add_product<T>(sums[t][r], q[r], f[r], in);
  }
}

template <class T>
DEVICE void multiply_float(const typename T::Tile* tiles, const Input& x, int step, float (*sums)[ROWS]) {
  float w[ROWS][T::kColumns];
#pragma unroll
  for (int r = 0; r < ROWS; r++) T::decode(tiles[r], w[r]);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const int first = step * T::kColumns;
    const float* row = static_cast<const float*>(x.rows) + t * x.columns + first;
    float in[T::kColumns];
#pragma unroll
    for (int c = 0; c < T::kColumns; c += RAGGED ? 1 : 4) {
      if (RAGGED) in[c] = first + c < x.columns ? row[c] : 0.f;
      else *reinterpret_cast<float4*>(in + c) = *reinterpret_cast<const float4*>(row + c);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < T::kColumns; c++) sums[t][r] = fmaf(w[r][c], in[c], sums[t][r]);
  }
}

// Add up all of x[t] * w[row] into sums, of this lane's steps.
template <class T>
DEVICE void accumulate(const typename T::Parts& parts, const int* rows, const Input& x, int first_step, float (*sums)[ROWS]) {
  const int steps = ceil_div(x.columns, T::kColumns);
  for (int step = first_step; step < steps; step += kStride * UNROLL) {
    typename T::Tile tiles[UNROLL][ROWS];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const bool valid = u == 0 || step + u * kStride < steps;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (valid) T::load(tiles[u][r], parts, rows[r], step + u * kStride);
        else T::clear(tiles[u][r]);
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int at = min(step + u * kStride, steps - 1);  // a cleared tile may meet any x
      if constexpr (T::kWords == 0) multiply_float<T>(tiles[u], x, at, sums);
      else multiply_int8<T>(tiles[u], x, at, sums);
    }
  }
}

template <class T>
DEVICE void multiply(const Segment& s, int block, const Input& x, const float* residual) {
  __shared__ float partial[WARPS][kOutputs];
  const int warp = threadIdx.x / 32, lane = lane_id(), subgroup = lane / LANES;
  const int share = warp % SPLIT, group = warp / SPLIT;
  const int group_row = (block * (WARPS / SPLIT) + group) * kWarpRows;
  const typename T::Parts parts(s.w, s.n, x.columns);
  if (threadIdx.x == 0) {
    const int first = block * kBlockRows, last = min(first + kBlockRows, s.n);
    const auto* codes = parts.codes + static_cast<long long>(first) * parts.stride;
    prefetch_l2(codes, (last - first) * parts.stride * static_cast<int>(sizeof(*codes)));
  }
  wait_for_previous();

  // what is added to the sums has arrived when they are done
  float extra[kOutputsOfThread];
#pragma unroll
  for (int i = 0; i < kOutputsOfThread; i++) {
    const int e = (i * SPLIT + share) * 32 + lane, row = group_row + e % kWarpRows;
    extra[i] = 0.f;
    if (e < kOutputs && row < s.n) {
      if (s.bias) extra[i] = s.bias[row];
      if (residual) extra[i] += residual[static_cast<long long>(e / kWarpRows) * s.n + row];
    }
  }

  int rows[ROWS];
  float sums[TOKENS][ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    rows[r] = min(group_row + subgroup * ROWS + r, s.n - 1);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) sums[t][r] = 0.f;
  }
  accumulate<T>(parts, rows, x, share * LANES + lane % LANES, sums);

#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float v = sums[t][r];
#pragma unroll
      for (int o = LANES / 2; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
      if (lane % LANES == 0) partial[warp][t * kWarpRows + subgroup * ROWS + r] = v;
    }
  if (SPLIT == 1) __syncwarp();
  else __syncthreads();
#pragma unroll
  for (int i = 0; i < kOutputsOfThread; i++) {
    const int e = (i * SPLIT + share) * 32 + lane, row = group_row + e % kWarpRows;
    if (e < kOutputs && row < s.n) {
      float v = partial[group * SPLIT][e];
#pragma unroll
      for (int w = 1; w < SPLIT; w++) v += partial[group * SPLIT + w][e];
      s.out[static_cast<long long>(e / kWarpRows) * s.n + row] = v + extra[i];
    }
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// x is int8 [TOKENS, columns] with scales and sums, or float [TOKENS, columns]; a missing matrix has no rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    gemv(const void* x, const float* x_scales, const float* x_sums, int columns, const float* residual,
         const void* w0, float* out0, const float* bias0, int n0, const void* w1, float* out1, const float* bias1, int n1,
         const void* w2, float* out2, const float* bias2, int n2) {
  let_next_start();
  const Input in{x, x_scales, x_sums, columns};
  Segment s{w0, out0, bias0, n0};
  int block = blockIdx.x, which = 0;
  if (SEGMENTS > 1 && block >= ceil_div(s.n, kBlockRows)) {
    block -= ceil_div(s.n, kBlockRows);
    s = {w1, out1, bias1, n1};
    which = 1;
    if (SEGMENTS > 2 && block >= ceil_div(s.n, kBlockRows)) {
      block -= ceil_div(s.n, kBlockRows);
      s = {w2, out2, bias2, n2};
      which = 2;
    }
  }
  // one body for each type, not for each matrix
  if constexpr (SEGMENTS > 1 && !kSame<TYPE1, TYPE0>) {
    if (which == 1 || (which == 2 && kSame<TYPE2, TYPE1>)) return multiply<TYPE1>(s, block, in, residual);
  }
  if constexpr (SEGMENTS > 2 && !kSame<TYPE2, TYPE0> && !kSame<TYPE2, TYPE1>) {
    if (which == 2) return multiply<TYPE2>(s, block, in, residual);
  }
  multiply<TYPE0>(s, block, in, residual);
}
