// Launches: plan.h decides, this file maps its answer to template instances.
#pragma once
#include "attention.h"
#include "attention_backward.cuh"
#include "attention_hopper.cuh"
#include "attention_short.cuh"
#include "attention_tiled.cuh"

namespace diffusion_fast {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T, int kHeadDim, int kKeyTiles>
const char* launch_short(const ForwardParams& p, const ForwardPlan& plan, void* stream) {
  const unsigned blocks = static_cast<unsigned>(p.batch) * p.heads * plan.blocks_per_head;
  return ptx::launch(attention_short<T, kHeadDim, kKeyTiles>, blocks, kThreads, plan.shared_bytes,
                     p, stream);
}

// What the copy engine gets to know of q, k or v. Dims that are broadcast have size 1 there, with
// any stride.
template <int kHeadDim>
BoxedTensor boxed(const void* base, const Strides& strides, const ForwardParams& p, int rows,
                  int box_rows) {
  auto size = [](int64_t stride, int n) { return static_cast<uint64_t>(stride == 0 ? 1 : n); };
  auto bytes = [](int64_t stride) {
    return static_cast<uint64_t>(stride == 0 ? kHeadDim : stride) * 2;
  };
  return {base,
          {kHeadDim, size(strides.row, rows), size(strides.head, p.heads),
           size(strides.batch, p.batch)},
          {bytes(strides.row), bytes(strides.head), bytes(strides.batch)},
          HopperShape<kHeadDim>::kBoxColumns,
          box_rows};
}

template <typename T, int kHeadDim>
const char* launch_hopper(const ForwardParams& p, const DeviceLimits& device, void* stream) {
  using Shape = HopperShape<kHeadDim>;
  const auto kernel = attention_hopper<T, kHeadDim>;
  const char* error = ptx::without_hopper(reinterpret_cast<const void*>(kernel), Shape::kThreads);
  if (error != nullptr) return error;
  if (Shape::kShared > device.shared_per_block)
    return "the Hopper kernel needs more shared memory per block";
  const bool one_row = (p.q_strides.row == 0 && p.queries > 1) ||
                       ((p.k_strides.row == 0 || p.v_strides.row == 0) && p.keys > 1);
  if (one_row) return "the Hopper kernel does not take rows of stride 0";
  HopperParams all{p, {}, {}, {}};
  error =
      ptx::encode<T>(&all.q, boxed<kHeadDim>(p.q, p.q_strides, p, p.queries, Shape::kGroupRows));
  if (error == nullptr)
    error = ptx::encode<T>(&all.k, boxed<kHeadDim>(p.k, p.k_strides, p, p.keys, Shape::kKeys));
  if (error == nullptr)
    error = ptx::encode<T>(&all.v, boxed<kHeadDim>(p.v, p.v_strides, p, p.keys, Shape::kKeys));
  if (error != nullptr) return error;
  const unsigned blocks =
      static_cast<unsigned>(p.batch) * p.heads * ceil_div(p.queries, Shape::kRows);
  return ptx::launch(kernel, blocks, Shape::kThreads, Shape::kShared, all, stream);
}

template <typename T, int kHeadDim>
const char* attention_forward(ForwardParams p, ForwardKernel wanted, const DeviceLimits& device,
                              void* stream) {
  if (wanted == ForwardKernel::kHopper) return launch_hopper<T, kHeadDim>(p, device, stream);
  using Short = ShortShape<kHeadDim, kShortKeyTiles[0]>;
  const ForwardPlan plan =
      plan_forward(Rows<kHeadDim>::kStride, Short::kRows, static_cast<int64_t>(p.batch) * p.heads,
                   p.queries, p.keys, wanted, device);
  if (plan.kernel == ForwardKernel::kTiled) {
    if (wanted == ForwardKernel::kShort)
      return "the keys do not fit the shared memory of the short-key kernel";
    using Shape = TiledShape<kHeadDim>;
    const unsigned blocks =
        static_cast<unsigned>(p.batch) * p.heads * ceil_div(p.queries, Shape::kRows);
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
  return plan_splits(ceil_div(keys, Shape::kOwn), ceil_div(queries, Shape::kOther), batch_heads,
                     device);
}

template <typename T, int kHeadDim>
const char* attention_backward(BackwardParams p, void* stream) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kDeltaRows = kThreads / 8;
  const unsigned heads = static_cast<unsigned>(p.batch) * p.heads;
  const char* error = nullptr;
  p.exact_delta = plan_exact_delta(p.keys);
  if (!p.exact_delta)
    error = ptx::launch(attention_delta<T, kHeadDim>, heads * ceil_div(p.queries, kDeltaRows),
                        kThreads, 0, p, stream);
  if (error != nullptr) return error;
  error =
      ptx::launch(attention_backward_queries<T, kHeadDim>, heads * ceil_div(p.queries, Shape::kOwn),
                  kThreads, Shape::kSharedQueries, p, stream);
  if (error != nullptr) return error;
  return ptx::launch(attention_backward_keys<T, kHeadDim>,
                     heads * ceil_div(p.keys, Shape::kOwn) * p.splits, kThreads, Shape::kSharedKeys,
                     p, stream);
}

}  // namespace diffusion_fast
