// Attention of many tokens of a sequence over pages: tiles on the tensor cores with a running softmax in float32
// (FlashAttention-2, arXiv:2307.08691). A block takes TOKENS tokens times GROUP query heads of one kv head as the rows of its
// tile, so that grouped heads read keys and values once. Bound by the tensor cores and by shared memory that feeds them.
//
// Keys and values are float16 or bfloat16 in shared memory; Q8_0 is widened to float16 on the way. Queries and weights are
// rounded to the same type; where that is too coarse they are sums of two (high + low): queries with QUERY_PARTS 2, weights
// with bfloat16 values.
//
// Defines: HEAD (a multiple of 16), N_KV, PER_KV (query heads of a kv head), GROUP, TOKENS, BLOCK, K_TYPE, V_TYPE (not f32),
// WINDOW (0: none), WARPS, ROW_TILES (of 16 rows, for each warp), COLUMNS (positions at once, a multiple of 16), STAGES (of
// shared memory: 2 loads ahead), MIN_TOKENS (a sequence with fewer in the step is the decode kernel's), SPLITS, QUERY_PARTS,
// OUT (f32, h16), N_DIMS and PAIRING (rotate.cuh) where queries come as they were projected.
// With SPLITS > 1 blocks share a tile's positions, for few tokens behind many; the last to end merges them in order.
#include "attention_tile.cuh"
#include "sequences.cuh"

#define OUT_F32 0
#define OUT_H16 2

constexpr int kRows = 16 * ROW_TILES * WARPS;
constexpr int kPasses = (PER_KV + GROUP - 1) / GROUP;
constexpr int kDimTiles = HEAD / 8, kColumnTiles = COLUMNS / 8;
constexpr bool kWideK = K_TYPE == KV_BF16, kWideV = V_TYPE == KV_BF16;
constexpr bool kKeepQuery = ROW_TILES * QUERY_PARTS == 1 && HEAD <= 128;  // in registers
constexpr int kRecord = kRows * (HEAD + 2);  // floats that a split leaves: weighted values, maxima, sums
constexpr int kMinBlocks = 4;                // of COLUMNS positions; less is not split
#ifdef N_DIMS
constexpr int kTurns = N_DIMS / 2;  // of a token
#else
constexpr int kTurns = 0;
#endif
constexpr float kNothing = -3.0e38f;  // a score below all others
constexpr float kSlack = 8.0f;        // weights may come to 2^this: float16 holds them, and float32 their sums
static_assert(TOKENS * GROUP <= kRows && COLUMNS % 16 == 0 && HEAD % 16 == 0, "sizes");

#if __CUDA_ARCH__ == 750
#define RESIDENT , 1  // by itself the compiler would spill for a third block, which shared memory has no room for
#else
#define RESIDENT
#endif

// q: float32 rows, with N_DIMS rotated here by angles [n_tokens][N_DIMS / 2], else already rotated; scale_log2: the scale of
// scores times log2(e). Grid (tiles, N_KV * passes, SPLITS), tiles >= n_tokens / TOKENS + n_sequences. partial: [tiles][N_KV *
// passes][SPLITS][kRecord]; tickets: [tiles][N_KV * passes], zero before and after; both only with SPLITS > 1. sequence_starts
// [n_sequences + 1]: sequences that are not there are empty; tokens from the last start on are padding and get zeros. Dynamic
// shared memory: queries, then STAGES times (keys, values), each row of kStride halves.
extern "C" __global__ void __launch_bounds__(kThreads RESIDENT) attention_prefill(
    const float* q, const float2* angles, float scale_log2, const void* k_pages, const __half* k_scales, const void* v_pages,
    const __half* v_scales, const int* positions, const int* sequence_starts, int n_sequences, const int* page_tables,
    int table_stride, int n_tokens, float* partial, int* tickets, void* out, float* scales) {
  DYNAMIC_SHARED(uint16_t, shared);
  constexpr int kWidth = N_KV * PER_KV * HEAD, kTile = COLUMNS * kStride;
  uint16_t* queries = shared;
  uint16_t* tiles = shared + QUERY_PARTS * kRows * kStride;
  const int warp = threadIdx.x >> 5, lane = lane_id(), g = lane / 4, t = lane % 4, y = blockIdx.y;
  const int kv_head = y / kPasses, n_heads = min(GROUP, PER_KV - y % kPasses * GROUP);
  const int first_column = (kv_head * PER_KV + y % kPasses * GROUP) * HEAD;
  let_next_start();
  wait_for_previous();

  // the last tiles of a sequence reach back furthest: they start first
  const Unit unit = find_unit(gridDim.x - 1 - blockIdx.x, sequence_starts, n_sequences,
                              [](int count) { return count >= MIN_TOKENS ? ceil_div(count, TOKENS) : 0; });
  if (unit.sequence < 0) {
    if (blockIdx.z) return;
    const int padding = sequence_starts[n_sequences] + unit.local * TOKENS;
    for (int row = padding; row < min(padding + TOKENS, n_tokens); row++)
      for (int c = threadIdx.x; c < n_heads * HEAD; c += kThreads) {
        const long long at = static_cast<long long>(row) * kWidth + first_column + c;
        if (OUT == OUT_H16) static_cast<__half*>(out)[at] = __float2half_rn(0.0f);
        else static_cast<float*>(out)[at] = 0.0f;
        if (OUT == OUT_H16 && scales && y == 0 && c == 0) scales[row] = 1.0f;
      }
    return;
  }
  const int first_token = unit.from + unit.local * TOKENS, n_mine = min(TOKENS, unit.count - unit.local * TOKENS);
  const int from = positions[first_token], end = from + n_mine;
  const int first = WINDOW ? max(0, from - WINDOW + 1) : 0;
  const int origin = first / COLUMNS * COLUMNS, n_blocks = ceil_div(end - origin, COLUMNS);
  const int blocks = SPLITS == 1 ? n_blocks : max(kMinBlocks, ceil_div(n_blocks, SPLITS));  // of each split
  const int n_used = SPLITS == 1 ? 1 : ceil_div(n_blocks, blocks), split = blockIdx.z;
  if (split >= n_used) return;
  const int begin = origin + split * blocks * COLUMNS, stop = min(end, begin + blocks * COLUMNS);
  const int* table = page_tables + static_cast<long long>(unit.sequence) * table_stride;

  // row r of the tile is token r / GROUP, head r % GROUP; rows past the end are zeros
#pragma unroll 8
  for (int i = threadIdx.x; i < kRows * (HEAD / 2); i += kThreads) {
    const int r = i / (HEAD / 2), column = i % (HEAD / 2) * 2, token = r / GROUP;
    float2 v = make_float2(0.0f, 0.0f);
    if (token < n_mine && r % GROUP < n_heads)
      v = query_pair(q + static_cast<long long>(first_token + token) * kWidth + first_column + r % GROUP * HEAD, column,
                     angles + static_cast<long long>(first_token + token) * kTurns);
    const float a = v.x * scale_log2, b = v.y * scale_log2;
    const uint32_t packed = pack<kWideK>(a, b);
    *reinterpret_cast<uint32_t*>(queries + r * kStride + column) = packed;
    if (QUERY_PARTS == 2)
      *reinterpret_cast<uint32_t*>(queries + (kRows + r) * kStride + column) = pack_rest<kWideK>(a, b, packed);
  }

  int pages[kTilePages + 1];  // of the tile that is asked for next: their numbers come while the one before is computed
  find_pages(pages, table, begin, first, end);
  const auto load = [&](int begin, int stage) {
    uint16_t* target = tiles + stage * 2 * kTile;
    load_tile<K_TYPE>(target, k_pages, k_scales, table, pages, kv_head, begin, first, end);
    load_tile<V_TYPE>(target + kTile, v_pages, v_scales, table, pages, kv_head, begin, first, end);
    cp_async_commit();
    find_pages(pages, table, begin + COLUMNS, first, end);
  };

  float acc[ROW_TILES][kDimTiles][4] = {};
  float highest[ROW_TILES][2], sum[ROW_TILES][2];  // of rows g and g + 8
  int limit[ROW_TILES][2];                         // last position that the row sees
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      highest[m][i] = kNothing;
      sum[m][i] = 0.0f;
      limit[m][i] = from + ((warp * ROW_TILES + m) * 16 + g + 8 * i) / GROUP;
    }

  uint32_t kept[kKeepQuery ? HEAD / 16 : 1][4];
  const uint16_t* query_row = queries + (warp * ROW_TILES * 16 + lane % 16) * kStride + lane / 16 * 8;
  const uint16_t* key_row = tiles + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
  const uint16_t* value_row = tiles + kTile + (lane / 8 % 2 * 8 + lane % 8) * kStride + lane / 16 * 8;
  if (STAGES == 2) load(begin, 0);
  if (kKeepQuery) {
    __syncthreads();
#pragma unroll
    for (int d = 0; d < HEAD / 16; d++) ldmatrix_x4(kept[d], query_row + d * 16);
  }
  for (int at = begin, stage = 0; at < stop; at += COLUMNS) {
    if (STAGES == 1) load(at, 0);
    cp_async_wait<0>();
    __syncthreads();  // behind it the other stage has been read by all
    if (STAGES == 2 && at + COLUMNS < stop) load(at + COLUMNS, stage ^ 1);
    const uint16_t *keys = key_row + stage * 2 * kTile, *values = value_row + stage * 2 * kTile;

    float scores[ROW_TILES][kColumnTiles][4] = {};
#pragma unroll
    for (int d = 0; d < HEAD / 16; d++) {
      uint32_t a[ROW_TILES][QUERY_PARTS][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int part = 0; part < QUERY_PARTS; part++) {
          if (kKeepQuery) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[m][part][i] = kept[d][i];
          } else {
            ldmatrix_x4(a[m][part], query_row + (part * kRows + m * 16) * kStride + d * 16);
          }
        }
#pragma unroll
      for (int n = 0; n < COLUMNS / 16; n++) {
        uint32_t b[4];  // positions n*16.. and n*16 + 8.., each of two halves of 16 columns
        ldmatrix_x4(b, keys + n * 16 * kStride + d * 16);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
          for (int part = 0; part < QUERY_PARTS; part++) {
            multiply<kWideK>(scores[m][2 * n], a[m][part], b);
            multiply<kWideK>(scores[m][2 * n + 1], a[m][part], b + 2);
          }
      }
    }

    // the mask, where a row may see less than all of these positions
    if (at + COLUMNS - 1 > from || (WINDOW && at <= end - 1 - WINDOW)) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int position = at + n * 8 + 2 * t + i % 2, last = limit[m][i / 2];
            if (position > last || (WINDOW && position <= last - WINDOW)) scores[m][n][i] = kNothing;
          }
    }

    // what came before is scaled again only where a score is far above all that the row has seen
    float top[ROW_TILES][2];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        top[m][i] = kNothing;
#pragma unroll
        for (int n = 0; n < kColumnTiles; n++)
          top[m][i] = fmaxf(top[m][i], fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        grows |= top[m][i] > highest[m][i] + kSlack;
      }
    if (__any_sync(FULL_WARP, grows)) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float most = fmaxf(highest[m][i], top[m][i]);
          most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
          most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
          const float correction = exp2_approx(highest[m][i] - most);
          highest[m][i] = most;
          sum[m][i] *= correction;
#pragma unroll
          for (int n = 0; n < kDimTiles; n++) {
            acc[m][n][2 * i] *= correction;
            acc[m][n][2 * i + 1] *= correction;
          }
        }
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float base = highest[m][i] == kNothing ? 0.0f : highest[m][i];  // a row that has seen nothing yet
#pragma unroll
        for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
          for (int j = 2 * i; j < 2 * i + 2; j++) {
            scores[m][n][j] = exp2_approx(scores[m][n][j] - base);
            sum[m][i] += scores[m][n][j];
          }
      }

#pragma unroll
    for (int n = 0; n < COLUMNS / 16; n++) {
      uint32_t weights[ROW_TILES][4], rest[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* pair = &scores[m][2 * n + i / 2][i % 2 * 2];
          weights[m][i] = pack<kWideV>(pair[0], pair[1]);
          if (kWideV) rest[m][i] = pack_rest<kWideV>(pair[0], pair[1], weights[m][i]);
        }
#pragma unroll
      for (int d = 0; d < HEAD / 16; d++) {
        uint32_t b[4];  // columns d*16.. and d*16 + 8.., each of two halves of 16 positions
        ldmatrix_x4<true>(b, values + n * 16 * kStride + d * 16);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
          multiply<kWideV>(acc[m][2 * d], weights[m], b);
          multiply<kWideV>(acc[m][2 * d + 1], weights[m], b + 2);
          if (kWideV) {
            multiply<kWideV>(acc[m][2 * d], rest[m], b);
            multiply<kWideV>(acc[m][2 * d + 1], rest[m], b + 2);
          }
        }
      }
    }
    if (STAGES == 1) __syncthreads();
    else stage ^= 1;
  }

#if SPLITS > 1
  const int pair = blockIdx.x * gridDim.y + y;
  float* records = partial + static_cast<long long>(pair) * SPLITS * kRecord;
#endif
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float total = sum[m][i];
      total += __shfl_xor_sync(FULL_WARP, total, 1);
      total += __shfl_xor_sync(FULL_WARP, total, 2);
      const int r = (warp * ROW_TILES + m) * 16 + g + 8 * i, token = r / GROUP;
#if SPLITS > 1
      if (n_used > 1) {
        float* record = records + static_cast<long long>(split) * kRecord;
#pragma unroll
        for (int n = 0; n < kDimTiles; n++)
          *reinterpret_cast<float2*>(record + r * HEAD + 8 * n + 2 * t) = make_float2(acc[m][n][2 * i], acc[m][n][2 * i + 1]);
        if (t == 0) record[kRows * HEAD + r] = highest[m][i], record[kRows * (HEAD + 1) + r] = total;
        continue;
      }
#endif
      const float inverse = 1.0f / total;
      if (token >= n_mine || r % GROUP >= n_heads) continue;
      const long long place = static_cast<long long>(first_token + token) * kWidth + first_column + r % GROUP * HEAD + 2 * t;
#pragma unroll
      for (int n = 0; n < kDimTiles; n++) {
        const float a = acc[m][n][2 * i] * inverse, b = acc[m][n][2 * i + 1] * inverse;
        if (OUT == OUT_H16) *reinterpret_cast<uint32_t*>(static_cast<__half*>(out) + place + 8 * n) = pack<false>(a, b);
        else *reinterpret_cast<float2*>(static_cast<float*>(out) + place + 8 * n) = make_float2(a, b);
      }
    }
  // a mean of float16 values fits float16 as it is
  if (OUT == OUT_H16 && scales && y == 0 && split == 0)
    for (int token = threadIdx.x; token < n_mine; token += kThreads) scales[first_token + token] = 1.0f;
#if SPLITS > 1
  if (n_used == 1) return;
  __shared__ int is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&tickets[pair], 1) == n_used - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) tickets[pair] = 0;
  // loads go past the L1, which does not know what other blocks have written
  for (int i = threadIdx.x; i < n_mine * GROUP * (HEAD / 4); i += kThreads) {
    const int r = i / (HEAD / 4), column = i % (HEAD / 4) * 4;
    if (r % GROUP >= n_heads) continue;
    float top[SPLITS], total = 0.0f, most = kNothing;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
      top[s] = s < n_used ? __ldcg(&records[s * kRecord + kRows * HEAD + r]) : kNothing;
      most = fmaxf(most, top[s]);
    }
#pragma unroll 4
    for (int s = 0; s < SPLITS; s++) {
      if (top[s] == kNothing) continue;  // none of its positions is seen by the row
      const float weight = exp2_approx(top[s] - most);
      const float4 other = __ldcg(reinterpret_cast<const float4*>(&records[s * kRecord + r * HEAD + column]));
      total += weight * __ldcg(&records[s * kRecord + kRows * (HEAD + 1) + r]);
      value.x += weight * other.x;
      value.y += weight * other.y;
      value.z += weight * other.z;
      value.w += weight * other.w;
    }
    const float inverse = 1.0f / total;
    const long long place = static_cast<long long>(first_token + r / GROUP) * kWidth + first_column + r % GROUP * HEAD + column;
    if (OUT == OUT_H16)
      *reinterpret_cast<uint2*>(static_cast<__half*>(out) + place) =
          make_uint2(pack<false>(value.x * inverse, value.y * inverse), pack<false>(value.z * inverse, value.w * inverse));
    else
      *reinterpret_cast<float4*>(static_cast<float*>(out) + place) =
          make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
  }
#endif
}
