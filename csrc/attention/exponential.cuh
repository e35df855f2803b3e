// 2^x without the special-function unit, of which a multiprocessor of Hopper has 16 lanes to 128
// for FMAs.
#pragma once
#include "../device.cuh"

namespace diffusion_fast {

// For x <= 1 or so: round to an integer and a rest in [-1/2, 1/2] (Cody and Waite), a minimax
// polynomial of the rest, times a power of 2 made from bits. Relative error at most 2.8e-6 (bf16
// rounds to 2e-3, fp16 to 4.9e-4); 0 from x < -126.5 down, -inf included; NaN stays NaN.
// mutants: exponential
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound =
      12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float clamped = ptx::max_or_nan(x, -127.f), rounded = clamped + kRound,
              f = clamped - (rounded - kRound);
  float y = fmaf(f, 0.009570102207362652f, 0.05591785907745361f);
  y = fmaf(y, f, 0.240247443318367f);
  y = fmaf(y, f, 0.6931217908859253f);
  y = fmaf(y, f, 0.9999992847442627f);
  return y * ptx::float_of((ptx::bits_of(rounded) << 23) + (127u << 23));
}

}  // namespace diffusion_fast
