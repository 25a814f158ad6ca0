// What cuBLAS leaves to be done: out[m, n] = product[m, n] * scale[m] * gain + bias[n] + residual[m, n].
// `product` may be `out`, and so may `residual`. Bound by memory: 8 bytes an element, 4 more with a residual.
// Defines: THREADS. A thread does four columns; blockIdx.y is the row.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_finish(float* out, int out_stride, const float* product, int product_stride, const float* scale, float gain,
                  const float* bias, const float* residual, int n) {
  const int column = 4 * (blockIdx.x * THREADS + threadIdx.x);
  wait_for_previous();
  let_next_start();
  if (column >= n) return;
  const long long row = blockIdx.y;
  const float factor = scale ? scale[row] * gain : gain;
  const float* from = product + row * product_stride + column;
  float* to = out + row * out_stride + column;
  const float* beside = residual ? residual + row * out_stride + column : nullptr;
  if (column + 4 <= n && (out_stride | product_stride) % 4 == 0) {
    float4 v = *reinterpret_cast<const float4*>(from);
    v.x *= factor, v.y *= factor, v.z *= factor, v.w *= factor;
    if (bias) v.x += bias[column], v.y += bias[column + 1], v.z += bias[column + 2], v.w += bias[column + 3];
    if (beside) {
      const float4 r = *reinterpret_cast<const float4*>(beside);
      v.x += r.x, v.y += r.y, v.z += r.z, v.w += r.w;
    }
    *reinterpret_cast<float4*>(to) = v;
    return;
  }
  for (int i = 0; i < 4 && column + i < n; i++) {
    float v = from[i] * factor;
    if (bias) v += bias[column + i];
    if (beside) v += beside[i];
    to[i] = v;
  }
}
