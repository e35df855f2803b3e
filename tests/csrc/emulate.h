// The line between the driver (emulate.cpp) and one compiled instance (emulate_instance.cpp).
#pragma once
#include <cstdint>

#include "attention/attention.h"

namespace diffusion_fast {
const char* emulate_forward(const ForwardParams& p, ForwardKernel wanted,
                            const DeviceLimits& device);
const char* emulate_backward(const BackwardParams& p);
int emulate_splits(int64_t batch_heads, int queries, int keys, const DeviceLimits& device);
}  // namespace diffusion_fast
