// out[m, n] = scale[m] * sum_k x[m, k] * w[n, k] + bias[n] + residual[m, n] for 8..256 rows m, weights in their blocks.
//
// A block of WARPS warps owns tiles of WARPS * 16 * MT weight rows and BM activation rows. Weights travel quantized, by
// cp.async, through a ring of W_STAGES chunks in shared memory (Marlin, arXiv:2408.11743); x through a finer ring of its own.
// Weights are operand a of mma, 16 rows of them to 8 activation rows, and are decoded straight into its registers: a sum does
// not care about the order of its columns, so lane t of four takes columns 8t..8t+7 of each 32 as its share of two
// products of depth 16, and reads x in the same order, 16 bytes at a time. Each weight is decoded once for BM rows.
//
// Work is cut into units of one chunk of one tile; each block takes `units_per_block` of them in a row (stream-K,
// arXiv:2301.03598). Blocks that share a tile leave their sums in `workspace`; the last to arrive adds them in order of
// columns, so results do not depend on timing.
//
// Defines: TYPE (mma_weights.cuh), UNITS (of a chunk; not for F16 and BF16), BM, MT, WARPS, KX (columns of x a stage), W_STAGES,
// X_STAGES, BLOCKS_PER_SM; the last bounds the registers.
#include "mma_weights.cuh"

using Format = TYPE;
constexpr int kThreads = WARPS * 32;
constexpr int kTileN = WARPS * 16 * MT;
constexpr int kColumns = Format::kColumns;  // of a chunk
constexpr int kSteps = kColumns / KX;       // stages of x a chunk
constexpr int kGroups = BM / 8;
constexpr int kXRow = KX * 2;  // bytes
constexpr int kXStage = BM * kXRow;
constexpr int kWStage = kTileN * Format::kRowBytes;
constexpr int kFragments = MT * kGroups;
static_assert(BM % 8 == 0 && KX % 64 == 0 && kColumns % KX == 0, "tiles are whole");
static_assert(W_STAGES > 1 && X_STAGES > 1 && X_STAGES - 1 <= (W_STAGES - 1) * kSteps, "a chunk must be asked for before its x");

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
  const float* scale;
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

// Byte of a column of x in a stage: the 32 bytes that four lanes read of each of four rows lie in different banks.
DEVICE int x_at(int row, int column) { return row * kXRow + (column / 8 ^ (row & 3) << 1) * 16 + column % 8 * 2; }

DEVICE void ask_weights(const Task& task, Asked& asked, uint8_t* ring, int slot) {
  Format::stage<kTileN, kThreads>(asked.from.w, ring + slot * kWStage, asked.first, asked.from.n, asked.at.k, task.columns);
  asked.at.next(task.n_chunks);
  if (asked.at.k == 0) asked.find_weights(task);
}

// Columns past the end are zeros, rows past the end a copy of the last one: what they give is never written.
DEVICE void ask_x(const Task& task, Asked& asked, int step, uint8_t* ring, int slot) {
  constexpr int kPieces = KX / 8, kTotal = BM * kPieces, kStep = kThreads / kPieces;
  const int row = threadIdx.x / kPieces, column = threadIdx.x % kPieces * 8, pitch = task.columns / 8;
  const int start = asked.at.k * kColumns + step * KX + column;
  const uint4* source = reinterpret_cast<const uint4*>(task.x) + start / 8;
  uint8_t* to = ring + slot * kXStage;
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

// Four columns from `column` + 4t, a constant multiple of 16, of row `first` + g: what depends on the lane is one number.
DEVICE uint2 load_x(const uint8_t* x, int first, int g, int t, int column) {
  return *reinterpret_cast<const uint2*>(x + first * kXRow + (x_at(g, 4 * t) ^ column * 2));
}

DEVICE void stage_weights(const Task& task, Cursor at, uint8_t* ring, int slot) {
  int first;
  const Segment s = task.segment(at.tile / task.m_tiles, first);
  Format::stage<kTileN, kThreads>(s.w, ring + slot * kWStage, first, s.n, at.k, task.columns);
}

// Columns past the end are zeros, rows past the end a copy of the last one: what they give is never written.
DEVICE void stage_x(const Task& task, Cursor at, int step, uint8_t* ring, int slot) {
  const int first = at.tile % task.m_tiles * BM;
  const int column0 = at.k * kColumns + step * KX;
  uint8_t* to = ring + slot * kXStage;
#pragma unroll
  for (int i = 0; i < whole(BM * KX / 8, kThreads) / kThreads; i++) {
    const int piece = threadIdx.x + i * kThreads;
    if (BM * KX / 8 % kThreads && piece >= BM * KX / 8) break;
    const int row = piece / (KX / 8), column = piece % (KX / 8) * 8;
    const half* from = task.x + static_cast<long long>(min(first + row, task.rows - 1)) * task.columns + column0 + column;
    cp_async16(to + x_at(row, column), from, column0 + column < task.columns);
  }
}

DEVICE void multiply(float (&sums)[MT][kGroups][4], const uint8_t* w, const uint8_t* x, int chunk, int step) {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3, warp = threadIdx.x >> 5;
#pragma unroll
  for (int pair = 0; pair < KX / 64; pair++) {
    uint32_t h[MT][2][2][4];  // [16 rows][row g or g + 8][32 columns][columns 8t + 2i and the next]
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        Format::decode<kTileN>(w, (warp * MT + m) * 16 + r * 8, g, t, chunk, step * (KX / 64) + pair, h[m][r]);
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const int column = pair * 64 + s * 32;
      #pragma unroll
      for (int j = 0; j < kGroups; j++) {
        const uint2 low = load_x(x, j * 8, g, t, column), high = load_x(x, j * 8, g, t, column + 16);
        const uint32_t b0[2] = {low.x, low.y}, b1[2] = {high.x, high.y};
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const uint32_t a0[4] = {h[m][0][s][0], h[m][1][s][0], h[m][0][s][1], h[m][1][s][1]};
          const uint32_t a1[4] = {h[m][0][s][2], h[m][1][s][2], h[m][0][s][3], h[m][1][s][3]};
          mma_f16(sums[m][j], a0, b0);
          mma_f16(sums[m][j], a1, b1);
        }
      }
    }
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
      const float scale = (task.scale ? task.scale[row] : 1.f) * (1.f / Format::kGain);
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
    matmul_mma(const half* __restrict__ x, const float* __restrict__ scale, const float* residual, float4* workspace,
               int* arrivals, int rows, int columns, int n_units, int units_per_block, const uint8_t* w0, float* out0,
               const float* bias0, int n0, const uint8_t* w1, float* out1, const float* bias1, int n1, const uint8_t* w2,
               float* out2, const float* bias2, int n2) {
  Task task = {x, scale, residual, workspace, arrivals, rows, columns, ceil_div(columns, kColumns), ceil_div(rows, BM),
               n_units, units_per_block, {{w0, out0, bias0, n0}, {w1, out1, bias1, n1}, {w2, out2, bias2, n2}}};
  DYNAMIC_SHARED(uint8_t, shared);
  uint8_t* w_ring = shared;
  uint8_t* x_ring = shared + W_STAGES * kWStage;
  const int first = blockIdx.x * units_per_block;
  const int n_chunks = min(units_per_block, n_units - first), n_stages = n_chunks * kSteps;
  Cursor at = {first / task.n_chunks, first % task.n_chunks};
  Asked w = {at}, xs = {at};
  w.find_weights(task);
  xs.find_x(task);

  // Weights depend on nobody: they may travel while the kernel before this one ends.
#pragma unroll
  for (int i = 0; i < W_STAGES - 1; i++) {
    if (i < n_chunks) ask_weights(task, w, w_ring, i);
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < X_STAGES - 1; i++) {
    if (i < n_stages) ask_x(task, xs, i % kSteps, x_ring, i);
    cp_async_commit();
  }

  float sums[MT][kGroups][4] = {};
  int w_slot = 0, x_slot = 0;
  for (int stage = 0, chunk = 0; chunk < n_chunks; chunk++) {
#pragma unroll
    for (int step = 0; step < kSteps; step++, stage++) {
      cp_async_wait<X_STAGES - 2>();
      __syncthreads();
      if (step == 0 && chunk + W_STAGES - 1 < n_chunks)
        ask_weights(task, w, w_ring, w_slot == 0 ? W_STAGES - 1 : w_slot - 1);
      if (stage + X_STAGES - 1 < n_stages)
        ask_x(task, xs, (step + X_STAGES - 1) % kSteps, x_ring, x_slot == 0 ? X_STAGES - 1 : x_slot - 1);
      cp_async_commit();
      multiply(sums, w_ring + w_slot * kWStage, x_ring + x_slot * kXStage, at.k, step);
      x_slot = x_slot == X_STAGES - 1 ? 0 : x_slot + 1;
    }
    w_slot = w_slot == W_STAGES - 1 ? 0 : w_slot + 1;
    const bool ends_tile = at.k == task.n_chunks - 1;
    if (chunk == n_chunks - 1) let_next_start();
    if (ends_tile || chunk == n_chunks - 1) {
      if (gather(task, sums, at.tile)) write_out(task, sums, at.tile);
#pragma unroll
      for (int i = 0; i < kFragments * 4; i++) sums[i / 4 / kGroups][i / 4 % kGroups][i % 4] = 0.f;
    }
    at.next(task.n_chunks);
  }
}
