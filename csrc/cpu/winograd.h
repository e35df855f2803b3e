// The arguments of a 3x3 convolution by Winograd's algorithm and of its weight's gradient, as they
// cross from Python: keep in step with diffusion_fast/ops/cpu/winograd.py.
#pragma once

#include <cstdint>

struct Winograd {
  const float* x;         // [B, H, W, C]: channels innermost, as all images here
  const float* weight;    // [O, C, 3, 3], or what winograd_pack made of it
  float* y;               // [B, H', W', O]
  const float* bias;      // [O], or null
  const float* add;       // [B, O], or null; a stride of 0 is one row for all images
  const float* residual;  // [B, H', W', O], or null
  int64_t add_stride;
  // The weight's strides; a window of 0 is one that is packed, and one that is read backwards has a
  // negative one.
  int64_t output, channel, window;
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, outputs;
  int64_t left, top;  // rows and columns of zeros before the image; those behind follow
  int32_t threads;
};

struct WinogradGradient {
  const float* x;                   // [B, H, W, C]
  const float* grad;                // [B, H', W', O], of the result
  float* weight;                    // the weight's gradient, dense
  int64_t output, channel, window;  // its strides
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, outputs;
  int64_t left, top;
  int32_t threads;
};
