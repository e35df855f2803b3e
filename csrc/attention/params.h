// What crosses the line between torch and the kernels: plain data, the same for every head dim.
#pragma once
#include <cstdint>

namespace diffusion_fast {

// Element strides of [batch, row, head, head dim]; the last is 1, rows begin at multiples of 16
// bytes. Batch stride 0 shares one prompt's K and V among all images.
struct Strides {
  int64_t batch, row, head;
};

struct ForwardParams {
  const void *q, *k, *v;
  void* out;
  float* lse;              // [batch, heads, queries] contiguous, natural logarithm; or nullptr
  const float* bias;       // per key, added to the scaled scores; or nullptr
  const int* key_lengths;  // [batch], keys past the length are not read; or nullptr
  Strides q_strides, k_strides, v_strides, out_strides;
  int64_t bias_batch, bias_head;
  int batch, heads, queries, keys;
  float scale;          // > 0
  int blocks_per_head;  // short-key kernel: blocks that share the query tiles of one head
};

struct BackwardParams {
  const void *q, *k, *v, *out, *dout;
  const float* lse;
  const float* bias;
  const int* key_lengths;
  float* delta;  // [batch, heads, queries] contiguous, workspace: sum over the keys of P * dP
  void *dq, *dk, *dv;
  // In place of dk and dv, where sums remain to be made: over splits (queries shared among blocks,
  // for few keys and many queries) or over a batch that shares its keys. Float, [splits, batch,
  // keys, heads, head dim] contiguous; or nullptr.
  float *dk_parts, *dv_parts;
  float* dbias_parts;  // [splits, batch, heads, keys] contiguous; or nullptr
  Strides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides,
      dv_strides;
  int64_t bias_batch, bias_head;
  int batch, heads, queries, keys;
  float scale;
  int splits;
  bool exact_delta;  // from P and dP themselves, not from out
};

}  // namespace diffusion_fast
