// The head dims this library was built with: all of them ahead of time, one when built on first
// use.
#pragma once
#include "attention/attention.h"

#if !defined(DIFFUSION_FAST_HEAD_DIMS)
#define DIFFUSION_FAST_HEAD_DIMS(X) X(32) X(40) X(48) X(64) X(80) X(96) X(128) X(160)
#endif

namespace diffusion_fast {

#define DIFFUSION_FAST_DECLARE(D) extern const AttentionEntry attention_##D;
DIFFUSION_FAST_HEAD_DIMS(DIFFUSION_FAST_DECLARE)
#undef DIFFUSION_FAST_DECLARE

// nullptr, or why the device cannot be asked.
const char* device_limits(int device, DeviceLimits* limits);

}  // namespace diffusion_fast
