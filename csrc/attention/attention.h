// The library's C++ face: one entry per head dim, the same for both types. Knows neither torch nor
// CUDA types.
#pragma once
#include "params.h"
#include "plan.h"

namespace diffusion_fast {

enum class Type { kHalf = 0, kBfloat16 = 1 };

struct KernelInfo {
  char name[64];
  const void* function;
  int threads, shared_bytes;
};

// Functions return nullptr, or why the kernels did not start. `stream` is a cudaStream_t.
struct AttentionEntry {
  const char* (*forward)(Type, ForwardParams, ForwardKernel, const DeviceLimits&, void* stream);
  const char* (*backward)(Type, const BackwardParams&, const DeviceLimits&, void* stream);
  int (*splits)(int64_t batch_heads, int queries, int keys, const DeviceLimits&);
  int (*kernels)(KernelInfo* out, int capacity);  // how many there are
};

}  // namespace diffusion_fast
