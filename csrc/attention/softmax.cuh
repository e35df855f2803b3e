// Softmax over scores that stay in registers.
//
// Scores are unscaled; probabilities are 2^(c s - base) with c = scale log2(e), one FMA and one ex2
// per score. A key bias is divided by the scale and added to the unscaled scores first, so that
// both cases share the rest.
#pragma once
#include "tile.cuh"

namespace diffusion_fast {

// Adds the key bias and sets columns from `keys` on to -inf. `first` is the key of column 0 of s.
// mutants: mask
template <int kM>
__device__ __forceinline__ void bias_and_mask(Scores<kM>& s, const float* bias, float inverse_scale,
                                              int first, int keys) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = first + n * 8 + (lane_id() & 3) * 2 + e;
      const bool allowed = key < keys;
      const float b = allowed && bias != nullptr ? bias[key] * inverse_scale : 0.f;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        s.x[m][n][e] = allowed ? s.x[m][n][e] + b : -INFINITY;
        s.x[m][n][e + 2] = allowed ? s.x[m][n][e + 2] + b : -INFINITY;
      }
    }
}

// The exponent to subtract, in base 2. A row without any allowed key has maximum -inf: subtract 0
// and its probabilities become 0, where -inf - -inf would be NaN.
// mutants: softmax
__device__ __forceinline__ float exponent_base(float maximum, float log2_scale) {
  return maximum == -INFINITY ? 0.f : maximum * log2_scale;
}

// s <- 2^(log2_scale s - base) per row; adds to sum what this lane holds of each row.
template <int kM>
__device__ __forceinline__ void exponentiate(Scores<kM>& s, float log2_scale,
                                             const float (&base)[kM][2], float (&sum)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s.x[m][n][e] = ptx::exp2_approximate(fmaf(s.x[m][n][e], log2_scale, -base[m][e >> 1]));
        sum[m][e >> 1] += s.x[m][n][e];
      }
}

template <int kM>
__device__ __forceinline__ void update_max(float (&maximum)[kM][2], const Scores<kM>& s) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) maximum[m][e >> 1] = fmaxf(maximum[m][e >> 1], s.x[m][n][e]);
}

// A row without any allowed key gives output 0 and log-sum-exp -inf.
__device__ __forceinline__ float inverse_or_zero(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }
__device__ __forceinline__ float log_sum_exp(float base, float sum) {
  return (base + log2f(sum)) * kLn2;
}

}  // namespace diffusion_fast
