// The activations of gated feed-forward layers (`graph.ops.Activation`). Defines: ACTIVATION.
#pragma once
#include "common.cuh"

#define ACTIVATION_SILU 0
#define ACTIVATION_GELU_TANH 1

// x * sigmoid(x), or the tanh form of GELU, which is x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
DEVICE float activated(float x) {
  const float z = ACTIVATION == ACTIVATION_SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-z));  // off by 1e-6: half the instructions of the exact ones
}
