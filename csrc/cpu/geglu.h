// The arguments of geglu and of its gradient, as they cross from Python: keep in step with
// diffusion_fast/ops/cpu/geglu.py.
#pragma once

#include <cstdint>

struct Geglu {
  const void* x;     // [R, 2C], values and gates
  const void* grad;  // [R, C], or null for the forward pass
  void* out;         // [R, C], or the gradient [R, 2C]
  int64_t rows, columns;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
};
