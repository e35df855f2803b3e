// The arguments of a 3x3 convolution by Winograd's algorithm, as they cross from Python: keep in
// step with diffusion_fast/ops/cpu/winograd.py.
#pragma once

#include <cstdint>

struct Winograd {
  const float* x;         // [B, H, W, C]: channels innermost, as all images here
  const float* weight;    // what winograd_pack made of the weight
  float* y;               // [B, H', W', O]
  const float* bias;      // [O], or null
  const float* add;       // [B, O], or null; a stride of 0 is one row for all images
  const float* residual;  // [B, H', W', O], or null
  int64_t add_stride;
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, outputs;
  int64_t left, top;  // rows and columns of zeros before the image; those behind follow
  int32_t threads;
};
