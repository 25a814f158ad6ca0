// Attention of single tokens over pages: flash-decoding (splits of the sequence side by side, arXiv:2205.14135 and the
// blog post of October 2023), float32 throughout. A block takes one token, one kv head and one span of positions, for GROUP
// query heads at once, so that keys and values are read once. Bound by reading them.
//
// A step is one CUDA graph: what steps before it stored and the step's own arrays are there before its first kernel begins. So
// with FUSED only q, k and v of the token are waited for, when the first keys and values are on their way.
//
// kLanes lanes hold a vector of HEAD columns, eight each. A warp has kTile positions of keys and of values in flight: the
// next ones are asked for as soon as these have been used, and the first ones before anything else. Each warp keeps its own
// running maximum, sum and weighted values; warps are merged at the end, then splits in ascending order by whichever block of
// the token and kv head ends last.
//
// Defines: HEAD, N_KV, PER_KV (query heads of a kv head), GROUP (at most 8), BLOCK, K_TYPE, V_TYPE, WINDOW (0: none), WARPS,
// UNROLL, MIN_TILES (of WARPS * kTile positions; less is not split), MAX_TOKENS (a sequence with more tokens in the step is
// the prompt kernel's; 0: none is, and block z takes token z), OUT. FUSED: rope and store of the token's k and v happen here
// (every sequence has one token); then N_DIMS, PAIRING and NORM too.
#include "decode_merge.cuh"
#include "sequences.cuh"
#if FUSED
#include "rotate.cuh"
#endif

// q: float32 rows, already rotated unless FUSED; scale_log2: the scale of scores times log2(e). Grid (splits, N_KV * passes,
// tokens). slots[m] < 0: padding, a row of zeros. partial: [gridDim.z][N_KV * passes][splits][kRecord];
// tickets: [gridDim.z][N_KV * passes], zero before and after. FUSED: k and v are this step's rows, angles [tokens][N_DIMS/2].
extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_decode(
    const float* q, float scale_log2, void* k_pages, __half* k_scales, void* v_pages, __half* v_scales,
    const int* positions, const int* slots, const int* sequence_of_token, const int* sequence_starts, int n_sequences,
    const int* page_tables, int table_stride, float* partial, int* tickets, void* out, float* scales, float* sums,
    const float* k, const float* v, const float2* angles, const float* q_weight, const float* k_weight, float eps) {
  __shared__ Shared shared;
  const int split = blockIdx.x, n_splits = gridDim.x, y = blockIdx.y;
  const int warp = threadIdx.x >> 5, lane = lane_id(), part = lane % kLanes, group = lane / kLanes;
  const int kv_head = y / kPasses, n_heads = min(GROUP, PER_KV - y % kPasses * GROUP);
  const int q_head = kv_head * PER_KV + y % kPasses * GROUP;
  let_next_start();
#if !FUSED
  wait_for_previous();  // for keys and values of this step's other tokens
#endif
#if MAX_TOKENS
  const Unit unit = find_unit(blockIdx.z, sequence_starts, n_sequences,
                              [](int count) { return count <= MAX_TOKENS ? count : 0; });
  if (unit.sequence < 0) return;
  const int row = unit.from + unit.local;
#else
  const int row = blockIdx.z;
#endif
  const int slot = slots[row], position = positions[row], sequence = sequence_of_token[row];
  const int length = slot < 0 ? 0 : position + 1;
  const int first = WINDOW ? max(0, length - WINDOW) : 0;
  const int start = first / kBlockTile * kBlockTile;
  const int n_tiles = ceil_div(length - start, kBlockTile);
  const int tiles = max(MIN_TILES, ceil_div(n_tiles, n_splits));  // of each split
  const int n_used = max(1, ceil_div(n_tiles, tiles));
  if (split >= n_used) return;
  if (length == 0) {
    if (FUSED) wait_for_previous();
    write_output(row, n_heads, [](int) { return 0.0f; }, out, scales, sums);
    return;
  }

  // tiles of this warp; the first one's keys and values are asked for before the queries are made ready
  const int* table = page_tables + static_cast<long long>(sequence) * table_stride;
  const int column = 8 * part < HEAD ? 8 * part : 0;
  const int tile_end = min(min((split + 1) * tiles, n_tiles), ceil_div(length - start - warp * kTile, kBlockTile));
  int tile = split * tiles;
  Raw8<K_TYPE> keys[UNROLL];
  Raw8<V_TYPE> values[UNROLL];
  int vectors[UNROLL];
  const auto locate = [&](int at) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      // what is masked reads a position that exists: pages behind the window are others' by now
      const int seen = max(first, min(start + at * kBlockTile + warp * kTile + u * kAtOnce + group, length - 1));
      vectors[u] = static_cast<int>(kv_vector(table[seen / BLOCK], kv_head, seen % BLOCK));
    }
  };
  // FUSED: the newest position is stored by this step, so what is asked for before that leaves it out
  const int newest = FUSED ? static_cast<int>(kv_vector(slot / BLOCK, kv_head, slot % BLOCK)) : 0;
  const auto load_keys = [&](bool is_stored) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (!FUSED || is_stored || vectors[u] != newest) keys[u].load(k_pages, k_scales, vectors[u], column);
  };
  const auto load_values = [&](bool is_stored) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (!FUSED || is_stored || vectors[u] != newest) values[u].load(v_pages, v_scales, vectors[u], column);
  };
  if (tile < tile_end) {
    locate(tile);
    load_keys(false);
    load_values(false);
  }

  const float* q_row = q + (static_cast<long long>(row) * (N_KV * PER_KV) + q_head) * HEAD;
#if FUSED
  wait_for_previous();
  const float2* turns = angles + static_cast<long long>(row) * (N_DIMS / 2);
  // the newest position lies in the last split: only it reads what it stores here
  if (split == n_used - 1) {
    const long long at = (static_cast<long long>(row) * N_KV + kv_head) * HEAD;
    float* scratch = shared.outputs[warp];
    if (warp == 0) {
      rotate_head<NORM>(k + at, k_weight, eps, turns, scratch);
      store_vector<K_TYPE>(scratch, k_pages, k_scales, newest);
    }
    if (warp == WARPS - 1) {
      copy_head(v + at, scratch);
      store_vector<V_TYPE>(scratch, v_pages, v_scales, newest);
    }
  }
  for (int h = WARPS - 1 - warp; h < n_heads; h += WARPS)
    rotate_head<NORM>(q_row + h * HEAD, q_weight, eps, turns, shared.rotated[h]);
  __syncthreads();
  q_row = shared.rotated[0];
  if (split == n_used - 1 && tile < tile_end) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (vectors[u] == newest) {
        keys[u].load(k_pages, k_scales, newest, column);
        values[u].load(v_pages, v_scales, newest, column);
      }
  }
#endif
  float query[GROUP][8];
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    const bool there = h < n_heads && 8 * part < HEAD;
    const float4* source = reinterpret_cast<const float4*>(q_row + h * HEAD + 8 * part);
    const float4 low = there ? source[0] : make_float4(0, 0, 0, 0), high = there ? source[1] : make_float4(0, 0, 0, 0);
    query[h][0] = low.x * scale_log2; query[h][1] = low.y * scale_log2;
    query[h][2] = low.z * scale_log2; query[h][3] = low.w * scale_log2;
    query[h][4] = high.x * scale_log2; query[h][5] = high.y * scale_log2;
    query[h][6] = high.z * scale_log2; query[h][7] = high.w * scale_log2;
  }

  float acc[GROUP][8] = {};
  float running = kNothing, sum = 0.0f;  // of head lane % kHeads, over the positions this lane has weighed
  float(*scores)[kHeads] = shared.scores[warp];
  for (; tile < tile_end; tile++) {
    const int base = start + tile * kBlockTile + warp * kTile;
    const bool goes_on = tile + 1 < tile_end;
    float dots[UNROLL * GROUP];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float key[8];
      keys[u].widen(key);
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) dot += query[h][i] * key[i];
        dots[u * GROUP + h] = dot;
      }
    }
    if (goes_on) {
      locate(tile + 1);
      load_keys(true);
    }
    int index = 0, count = UNROLL * GROUP;
    Fold<UNROLL * GROUP, kLanes / 2, UNROLL * GROUP>::run(dots, index, count);
#pragma unroll
    for (int i = 0; i < kFolded; i++)
      if (i < count) scores[(index + i) / GROUP * kAtOnce + group][(index + i) % GROUP] = dots[i];
    __syncwarp();

    // softmax: lane l works on head l % kHeads, positions l / kHeads, + 32 / kHeads, ...
    constexpr int kStep = 32 / kHeads, kMine = (kTile + kStep - 1) / kStep;
    const int head = lane % kHeads;
    float mine[kMine], highest = running;
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      const int at = lane / kHeads + i * kStep, position = base + at;
      const bool seen = at < kTile && position >= first && position < length && head < GROUP;
      mine[i] = seen ? scores[at][head] : kNothing;
      highest = fmaxf(highest, mine[i]);
    }
#pragma unroll
    for (int o = kHeads; o < 32; o *= 2) highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, o));
    const float correction = weight_of(running, highest);
    sum *= correction;
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      const int at = lane / kHeads + i * kStep;
      const float weight = weight_of(mine[i], highest);
      sum += weight;
      if (at < kTile) scores[at][head] = weight;
    }
    if (__any_sync(FULL_WARP, highest > running)) {
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        const float factor = __shfl_sync(FULL_WARP, correction, h);
#pragma unroll
        for (int i = 0; i < 8; i++) acc[h][i] *= factor;
      }
    }
    running = highest;
    __syncwarp();
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float value[8];
      values[u].widen(value);
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        const float weight = scores[u * kAtOnce + group][h];
#pragma unroll
        for (int i = 0; i < 8; i++) acc[h][i] += weight * value[i];
      }
    }
    if (goes_on) load_values(true);
    __syncwarp();
  }

  // positions of a warp that lie in other lanes, then the warps of the block
#pragma unroll
  for (int o = kHeads; o < 32; o *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, o);
#pragma unroll
  for (int h = 0; h < GROUP; h++)
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int o = kLanes; o < 32; o *= 2) acc[h][i] += __shfl_xor_sync(FULL_WARP, acc[h][i], o);
  if (lane < kHeads) shared.maxima[warp][lane] = running, shared.sums[warp][lane] = sum;
  if (group == 0 && 8 * part < HEAD) {
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      float4* target = reinterpret_cast<float4*>(&shared.outputs[warp][h * HEAD + 8 * part]);
      target[0] = make_float4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
      target[1] = make_float4(acc[h][4], acc[h][5], acc[h][6], acc[h][7]);
    }
  }
  __syncthreads();
  const auto highest_of = [&](int h) {
    float highest = kNothing;
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared.maxima[w][h]);
    return highest;
  };
  const auto sum_of = [&](int h, float highest) {
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += shared.sums[w][h] * weight_of(shared.maxima[w][h], highest);
    return total;
  };
  const auto weighted = [&](int c, float highest) {
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += shared.outputs[w][c] * weight_of(shared.maxima[w][c / HEAD], highest);
    return total;
  };
  if (n_used == 1) {
    write_output(row, n_heads, [&](int c) {
      const float highest = highest_of(c / HEAD);
      return weighted(c, highest) / sum_of(c / HEAD, highest);
    }, out, scales, sums);
    return;
  }

  const int pair = blockIdx.z * gridDim.y + y;
  float* records = partial + static_cast<long long>(pair) * n_splits * kRecord;
  float* record = records + split * kRecord;
  for (int c = threadIdx.x; c < kColumns; c += 32 * WARPS) record[c] = weighted(c, highest_of(c / HEAD));
  if (threadIdx.x < GROUP) {
    const float highest = highest_of(threadIdx.x);
    record[kColumns + threadIdx.x] = highest;
    record[kColumns + GROUP + threadIdx.x] = sum_of(threadIdx.x, highest);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = atomicAdd(&tickets[pair], 1) == n_used - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  if (threadIdx.x == 0) tickets[pair] = 0;
  merge_splits(shared, records, n_used);
  __syncthreads();
  write_output(row, n_heads, [&](int c) { return shared.outputs[0][c]; }, out, scales, sums);
}
