// Rotary embedding (arXiv:2104.09864), fused with the norm of each head and with writing keys and values into their pages.
// Bound by launch latency in decode, by memory in prompts.
// Defines: HEAD, N_DIMS, PAIRING, NORM (1: each head is normalized first), ROTATE (0: only store), N_KV, BLOCK, K_TYPE, V_TYPE, WARPS.
// Without them only rope_angles is there.
#include "ptx.cuh"
#ifdef HEAD
#include "kv.cuh"
#include "rotate.cuh"
#endif

// cos and sin of a turn's fraction: `turns` is the angle in full circles.
DEVICE float2 cos_sin(double turns) {
  const float rest = static_cast<float>(2.0 * (turns - rint(turns)));
  float s, c;
  sincospif(rest, &s, &c);
  return make_float2(c, s);
}

// (cos, sin) * magnitude of each token's position, once a step for all layers: out [n_tokens][n_pairs]. frequencies are in
// full circles a position, float64: float32 would be off by 0.008 radians at position 131,072.
extern "C" __global__ void rope_angles(const int* positions, const double* frequencies, int n_pairs, float magnitude,
                                       float2* out) {
  const int pair = threadIdx.x + blockIdx.x * blockDim.x, row = blockIdx.y;
  let_next_start();
  wait_for_previous();
  if (pair >= n_pairs) return;
  const float2 turn = cos_sin(static_cast<double>(positions[row]) * frequencies[pair]);
  out[static_cast<long long>(row) * n_pairs + pair] = make_float2(turn.x * magnitude, turn.y * magnitude);
}

#ifdef HEAD
// A warp a head: first the n_q query heads (q_out may be q), then, with n_kv = N_KV, key heads into k_pages and value heads
// into v_pages. A token with slot -1 (padding) stores nothing. Grid (ceil(heads / WARPS), tokens).
extern "C" __global__ void __launch_bounds__(32 * WARPS) rope_store(
    const float* q, const float* q_weight, float* q_out, int n_q, const float* k, const float* k_weight, const float* v,
    int n_kv, float eps, const float2* angles, const int* slots, void* k_pages, __half* k_scales, void* v_pages,
    __half* v_scales) {
  __shared__ __align__(8) float heads[WARPS][HEAD];
  const int warp = threadIdx.x >> 5, row = blockIdx.y;
  int head = blockIdx.x * WARPS + warp;
  let_next_start();
  wait_for_previous();
  if (head >= n_q + 2 * n_kv) return;
  float* rotated = heads[warp];
  const float2* turns = angles + static_cast<long long>(row) * (N_DIMS / 2);
  if (head < n_q) {
    rotate_head<NORM>(q + (static_cast<long long>(row) * n_q + head) * HEAD, q_weight, eps, turns, rotated);
    float* target = q_out + (static_cast<long long>(row) * n_q + head) * HEAD;
#pragma unroll
    for (int column = lane_id(); column < HEAD; column += 32) target[column] = rotated[column];
    return;
  }
  const int slot = slots[row];
  if (slot < 0) return;
  head -= n_q;
  if (head < n_kv) {
    const float* source = k + (static_cast<long long>(row) * N_KV + head) * HEAD;
    if (ROTATE) rotate_head<NORM>(source, k_weight, eps, turns, rotated);
    else copy_head(source, rotated);
    store_vector<K_TYPE>(rotated, k_pages, k_scales, kv_vector(slot / BLOCK, head, slot % BLOCK));
  } else {
    head -= n_kv;
    copy_head(v + (static_cast<long long>(row) * N_KV + head) * HEAD, rotated);
    store_vector<V_TYPE>(rotated, v_pages, v_scales, kv_vector(slot / BLOCK, head, slot % BLOCK));
  }
}
#endif
