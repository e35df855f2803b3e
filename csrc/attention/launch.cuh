// Launches: plan.h decides, this file maps its answer to template instances.
#pragma once
#include "attention.h"
#include "attention_backward.cuh"
#include "attention_short.cuh"
#include "attention_tiled.cuh"

namespace diffusion_fast {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T, int kHeadDim, int kKeyTiles>
const char* launch_short(const ForwardParams& p, const ForwardPlan& plan, void* stream) {
  const unsigned blocks = static_cast<unsigned>(p.batch) * p.heads * plan.blocks_per_head;
  return ptx::launch(attention_short<T, kHeadDim, kKeyTiles>, blocks, kThreads, plan.shared_bytes, p, stream);
}

template <typename T, int kHeadDim>
const char* attention_forward(ForwardParams p, ForwardKernel wanted, const DeviceLimits& device, void* stream) {
  using Short = ShortShape<kHeadDim, kShortKeyTiles[0]>;
  const ForwardPlan plan = plan_forward(Rows<kHeadDim>::kStride, Short::kRows, static_cast<int64_t>(p.batch) * p.heads,
                                        p.queries, p.keys, wanted, device);
  if (plan.kernel == ForwardKernel::kTiled) {
    if (wanted == ForwardKernel::kShort) return "the keys do not fit the shared memory of the short-key kernel";
    using Shape = TiledShape<kHeadDim>;
    const unsigned blocks = static_cast<unsigned>(p.batch) * p.heads * ceil_div(p.queries, Shape::kRows);
    return ptx::launch(attention_tiled<T, kHeadDim>, blocks, kThreads, Shape::kShared, p, stream);
  }
  p.blocks_per_head = plan.blocks_per_head;
  switch (plan.key_tiles) {
    case kShortKeyTiles[0]: return launch_short<T, kHeadDim, kShortKeyTiles[0]>(p, plan, stream);
    case kShortKeyTiles[1]: return launch_short<T, kHeadDim, kShortKeyTiles[1]>(p, plan, stream);
    default: return launch_short<T, kHeadDim, kShortKeyTiles[2]>(p, plan, stream);
  }
}

template <int kHeadDim>
int attention_splits(int64_t batch_heads, int queries, int keys, const DeviceLimits& device) {
  using Shape = BackwardShape<kHeadDim>;
  return plan_splits(ceil_div(keys, Shape::kOwn), ceil_div(queries, Shape::kOther), batch_heads, device);
}

template <typename T, int kHeadDim>
const char* attention_backward(BackwardParams p, void* stream) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kDeltaRows = kThreads / 8;
  const unsigned heads = static_cast<unsigned>(p.batch) * p.heads;
  const char* error = nullptr;
  p.exact_delta = plan_exact_delta(p.keys);
  if (!p.exact_delta)
    error = ptx::launch(attention_delta<T, kHeadDim>, heads * ceil_div(p.queries, kDeltaRows), kThreads, 0, p, stream);
  if (error != nullptr) return error;
  error = ptx::launch(attention_backward_queries<T, kHeadDim>, heads * ceil_div(p.queries, Shape::kOwn), kThreads,
                      Shape::kSharedQueries, p, stream);
  if (error != nullptr) return error;
  return ptx::launch(attention_backward_keys<T, kHeadDim>, heads * ceil_div(p.keys, Shape::kOwn) * p.splits, kThreads,
                     Shape::kSharedKeys, p, stream);
}

}  // namespace diffusion_fast
