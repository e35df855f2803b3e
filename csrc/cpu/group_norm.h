// The arguments of group_norm_silu and of its gradient, as they cross from Python: keep in step
// with diffusion_fast/ops/cpu/group_norm.py.
#pragma once

#include <cstdint>

struct GroupNorm {
  // x [B, C1, S] and x2 [B, C2, S] (or null) of one dtype, channels innermost where `last`.
  const void *x, *x2;
  void* y;                           // [B, C, S], C = C1 + C2
  const float *weight, *bias;        // [C]
  const float *add, *scale, *shift;  // [B, C] or null; a stride of 0 is one row for all images
  int64_t add_stride, scale_stride, shift_stride;
  int64_t batch, channels, channels2, pixels, groups;
  double eps;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t last, silu, threads;
  // Of the gradient only: grad like y; dx, dx2 like x, x2; float32 [C], [C], and [B, C] or null.
  const void* grad;
  void *dx, *dx2;
  float *dweight, *dbias, *dadd, *dscale, *dshift;
};
