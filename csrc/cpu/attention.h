// The arguments of attention and of its gradients, as they cross from Python: keep in step with
// diffusion_fast/ops/cpu/attention.py. Strides count elements; the last dimension's is 1.
#pragma once

#include <cstdint>

struct Attention {
  const void *q, *k, *v;   // [B, Sq, H, D], [B, Sk, H, D] twice, of one dtype
  void* out;               // [B, Sq, H, D], contiguous
  float* lse;              // natural log of the sum of exp(scores), [B, H, Sq]; or null
  const float* bias;       // [B, H, Sq, Sk], or null
  const int64_t* lengths;  // [B], keys that are seen of the first part; or null
  const int64_t* parts;    // how many keys each part has, [parts_count]
  const float* weights;    // of the parts behind the first, [B, parts_count - 1, Sq]
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of B, S, H
  int64_t bias_strides[4], weights_strides[3];
  int64_t batch, heads, queries, keys, dim, parts_count;
  double scale;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
  int32_t best;  // that may compute bfloat16: 0 float32, 1 AVX512-BF16, 2 AMX
};

struct AttentionGradients {
  const float *q, *k, *v;   // as above
  const float *out, *grad;  // attention's result and its gradient, [B, Sq, H, D]
  const float* lse;         // [B, H, Sq]
  const int64_t* lengths;   // [B], or null
  float *dq, *dk, *dv;      // of q, k and v, contiguous
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], grad_strides[3];
  int64_t batch, heads, queries, keys, dim;
  double scale;
  int32_t threads;
};

// Attention in bfloat16 on a CPU with AMX, or with AVX512-BF16; false, and nothing done, without.
bool attention_in_tiles(const Attention& a);
bool attention_in_pairs(const Attention& a);
