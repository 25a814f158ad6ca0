// out[m, n] = scale[m] * sum_k x[m, k] * w[n, k] + bias[n] + residual[m, n] for 8..256 rows m, weights in their blocks.
//
// A block of WARPS warps owns tiles of WARPS * 16 * MT weight rows and BM activation rows. Weights travel quantized, by
// cp.async, through a ring of W_STAGES chunks in shared memory (Marlin, arXiv:2408.11743); x through a finer ring of its own
// (mma_tile.cuh). Each weight is decoded once for BM rows.
//
// Work is cut into units of one chunk of one tile; each block takes `units_per_block` of them in a row (stream-K,
// arXiv:2301.03598). Blocks that share a tile leave their sums in `workspace`; the last to arrive adds them in order of
// columns, so results do not depend on timing.
//
// Defines: those of mma_tile.cuh, and BLOCKS_PER_SM, which bounds the registers.
#include "mma_loop.cuh"

// The matrices of a launch, such as q, k and v or gate and up: they read the same x. Those that are not needed have no rows.
constexpr int kSegments = 3;
struct Segment {
  const uint8_t* w;   // weights_layout.py
  float* out;         // [rows, n]
  const float* bias;  // [n] or null
  int n;
};

// A place in the block's work: chunk `k` of tile `tile`; tiles count activation tiles first, so that neighbours share weights.
struct Cursor {
  int tile, k;
  DEVICE void next(int n_chunks) {
    if (++k == n_chunks) {
      k = 0;
      tile++;
    }
  }
};

struct Task {
  const half* x;  // [rows, columns]
  const float* scale;  // of each row, or null: all are `factor`
  float factor;
  const float* residual;
  float4* workspace;
  int* arrivals;
  int rows, columns, n_chunks, m_tiles, units, units_per_block;
  Segment segments[kSegments];

  // The segment that n-tile `tile_n` lies in, and the tile's first row there.
  DEVICE Segment segment(int tile_n, int& first) const {
    Segment s = segments[0];
    first = tile_n * kTileN;
#pragma unroll
    for (int i = 1; i < kSegments; i++) {
      const int before = ceil_div(s.n, kTileN) * kTileN;
      if (first >= before) {
        first -= before;
        s = segments[i];
      } else {
        break;
      }
    }
    return s;
  }
};

// Where the next chunk of weights, or the next stage of x, is asked from.
struct Asked {
  Cursor at;
  Segment from;  // of weights
  int first;     // row of the tile in it; of x

  DEVICE void find_weights(const Task& task) { from = task.segment(at.tile / task.m_tiles, first); }
  DEVICE void find_x(const Task& task) { first = at.tile % task.m_tiles * BM; }
};

DEVICE void ask_weights(const Task& task, Asked& asked, uint8_t* to) {
  Format::stage<kTileN, kThreads>(asked.from.w, to, asked.first, asked.from.n, asked.at.k, task.columns);
  asked.at.next(task.n_chunks);
  if (asked.at.k == 0) asked.find_weights(task);
}

// Columns past the end are zeros, rows past the end a copy of the last one: what they give is never written.
DEVICE void ask_x(const Task& task, Asked& asked, int step, uint8_t* to) {
  constexpr int kPieces = KX / 8, kTotal = BM * kPieces, kStep = kThreads / kPieces;
  const int row = threadIdx.x / kPieces, column = threadIdx.x % kPieces * 8, pitch = task.columns / 8;
  const int start = asked.at.k * kColumns + step * KX + column;
  const uint4* source = reinterpret_cast<const uint4*>(task.x) + start / 8;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; i++) {
    if (kTotal % kThreads && threadIdx.x + i * kThreads >= kTotal) break;
    const int place = kStep % 4 == 0 ? x_at(row, column) + i * kStep * kXRow : x_at(row + i * kStep, column);
    const int offset = min((asked.first + row) * pitch + i * kStep * pitch, (task.rows - 1) * pitch);
    cp_async16(to + place, source + offset, start < task.columns);
  }
  if (step == kSteps - 1) {
    asked.at.next(task.n_chunks);
    if (asked.at.k == 0) asked.find_x(task);
  }
}

// Sums of all blocks that worked on this tile; true in the block that has them all and must write them.
DEVICE bool gather(const Task& task, float (&sums)[MT][kGroups][4], int tile) {
  __shared__ int is_last;
  const int first = tile * task.n_chunks / task.units_per_block;
  const int last = ((tile + 1) * task.n_chunks - 1) / task.units_per_block;
  if (first == last) return true;
  // A block leaves at most two partial tiles: the one it began in the middle of and the one it ended in the middle of.
  const int block = blockIdx.x;
  float4* mine = task.workspace + (block * 2LL + (block == first)) * kFragments * kThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kFragments; i++) {
    const float* d = sums[i / kGroups][i % kGroups];
    mine[i * kThreads] = make_float4(d[0], d[1], d[2], d[3]);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(task.arrivals + tile, 1) == last - first;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kFragments; i++) {
    float* d = sums[i / kGroups][i % kGroups];
    float4 total = make_float4(0, 0, 0, 0);
    for (int b = first; b <= last; b++) {
      const float4* theirs = task.workspace + (b * 2LL + (b == first)) * kFragments * kThreads + threadIdx.x;
      const float4 v = __ldcg(theirs + i * kThreads);  // not from the L1, which other multiprocessors do not write
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    d[0] = total.x, d[1] = total.y, d[2] = total.z, d[3] = total.w;
  }
  if (threadIdx.x == 0) task.arrivals[tile] = 0;  // ready for the next launch
  return true;
}

DEVICE void write_out(const Task& task, const float (&sums)[MT][kGroups][4], int tile) {
  int n0;
  const Segment s = task.segment(tile / task.m_tiles, n0);
  const int m0 = tile % task.m_tiles * BM, lane = lane_id(), g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kGroups; j++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = m0 + j * 8 + 2 * t + e;
      if (row >= task.rows) continue;
      const float scale = (task.scale ? task.scale[row] : task.factor) * (1.f / Format::kGain);
#pragma unroll
      for (int i = 0; i < MT * 2; i++) {
        const int n = n0 + ((threadIdx.x >> 5) * MT + i / 2) * 16 + i % 2 * 8 + g;
        if (n >= s.n) continue;
        const long long at = static_cast<long long>(row) * s.n + n;
        float v = sums[i / 2][j][i % 2 * 2 + e] * scale;
        if (s.bias) v += s.bias[n];
        if (task.residual) v += task.residual[at];
        s.out[at] = v;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    matmul_mma(const half* x, const float* scale, float factor, const float* residual, float4* workspace, int* arrivals,
               int rows, int columns, int n_units, int units_per_block, const uint8_t* w0, float* out0,
               const float* bias0, int n0, const uint8_t* w1, float* out1, const float* bias1, int n1, const uint8_t* w2,
               float* out2, const float* bias2, int n2) {
  Task task = {x, scale, factor, residual, workspace, arrivals, rows, columns, ceil_div(columns, kColumns), ceil_div(rows, BM),
               n_units, units_per_block, {{w0, out0, bias0, n0}, {w1, out1, bias1, n1}, {w2, out2, bias2, n2}}};
  DYNAMIC_SHARED(uint8_t, shared);
  const int first = blockIdx.x * units_per_block;
  Cursor at = {first / task.n_chunks, first % task.n_chunks};
  Asked w = {at}, xs = {at};
  w.find_weights(task);
  xs.find_x(task);
  float sums[MT][kGroups][4] = {};
  multiply_chunks(
      sums, shared, min(units_per_block, n_units - first), at.k, [&](uint8_t* to) { ask_weights(task, w, to); },
      [&](uint8_t* to, int step) { ask_x(task, xs, step, to); },
      [&](bool is_last) {
        if (is_last) let_next_start();
        if (is_last || at.k == task.n_chunks - 1) {
          if (gather(task, sums, at.tile)) write_out(task, sums, at.tile);
#pragma unroll
          for (int i = 0; i < kFragments * 4; i++) sums[i / 4 / kGroups][i / 4 % kGroups][i % 4] = 0.f;
        }
        at.next(task.n_chunks);
      });
}
