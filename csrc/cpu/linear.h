// The arguments of a linear layer, as they cross from Python: keep in step with
// diffusion_fast/ops/cpu/linear.py.
#pragma once

#include <cstdint>

struct Linear {
  const float* x;         // [R, K]
  const float* weight;    // what linear_pack made of the weight
  float* y;               // [R, N], with a gate [R, N / 2]
  const float* bias;      // [N], or null
  const float* residual;  // as y, or null
  int64_t rows, inner, outputs;
  int32_t geglu;
  int32_t threads;
};
