// One type and head dim of the kernels, compiled for the host. TYPE and HEAD_DIM come from the
// command line.
#include "emulate.h"

#include "attention/launch.cuh"

namespace diffusion_fast {
const char* emulate_forward(const ForwardParams& p, ForwardKernel wanted,
                            const DeviceLimits& device) {
  return attention_forward<TYPE, HEAD_DIM>(p, wanted, device, nullptr);
}
const char* emulate_backward(const BackwardParams& p) {
  return attention_backward<TYPE, HEAD_DIM>(p, nullptr);
}
int emulate_splits(int64_t batch_heads, int queries, int keys, const DeviceLimits& device) {
  return attention_splits<HEAD_DIM>(batch_heads, queries, keys, device);
}
}  // namespace diffusion_fast
