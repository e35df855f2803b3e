// What an instance file needs: the entry of one head dim and the list of its kernels. Included by
// nvcc only.
#pragma once
#include <cstdio>

#include "launch.cuh"

namespace diffusion_fast {

class KernelList {
 public:
  KernelList(KernelInfo* out, int capacity) : out_(out), capacity_(capacity) {}
  template <typename Kernel>
  void add(const char* name, const char* type, int head_dim, int key_tiles, Kernel kernel,
           int shared_bytes, int threads = kThreads) {
    if (count_ < capacity_) {
      KernelInfo& k = out_[count_];
      k = {{}, reinterpret_cast<const void*>(kernel), threads, shared_bytes};
      if (key_tiles > 0)
        snprintf(k.name, sizeof k.name, "%s<%s, %d, %d>", name, type, head_dim, key_tiles * 16);
      else
        snprintf(k.name, sizeof k.name, "%s<%s, %d>", name, type, head_dim);
    }
    ++count_;
  }
  template <typename T, int kHeadDim>
  void add_all(const char* type) {
    add_short<T, kHeadDim, 0>(type);
    add_short<T, kHeadDim, 1>(type);
    add_short<T, kHeadDim, 2>(type);
    using Hopper = HopperShape<kHeadDim>;
    const auto hopper = attention_hopper<T, kHeadDim>;
    if (ptx::without_hopper(reinterpret_cast<const void*>(hopper), Hopper::kThreads) == nullptr)
      add("attention_hopper", type, kHeadDim, 0, hopper, Hopper::kShared, Hopper::kThreads);
    using Backward = BackwardShape<kHeadDim>;
    add("attention_tiled", type, kHeadDim, 0, attention_tiled<T, kHeadDim>,
        TiledShape<kHeadDim>::kShared);
    add("attention_delta", type, kHeadDim, 0, attention_delta<T, kHeadDim>, 0);
    add("attention_backward_keys", type, kHeadDim, 0, attention_backward_keys<T, kHeadDim>,
        Backward::kSharedKeys);
    add("attention_backward_queries", type, kHeadDim, 0, attention_backward_queries<T, kHeadDim>,
        Backward::kSharedQueries);
  }
  int count() const { return count_; }

 private:
  template <typename T, int kHeadDim, int kIndex>
  void add_short(const char* type) {
    constexpr int kTiles = kShortKeyTiles[kIndex];
    add("attention_short", type, kHeadDim, kTiles, attention_short<T, kHeadDim, kTiles>,
        ShortShape<kHeadDim, kTiles>::shared_bytes(kTiles * 16));
  }
  KernelInfo* out_;
  int capacity_, count_ = 0;
};

template <int kHeadDim>
AttentionEntry attention_entry() {
  return {[](Type type, ForwardParams p, ForwardKernel wanted, const DeviceLimits& device,
             void* stream) {
            return type == Type::kHalf
                       ? attention_forward<Half, kHeadDim>(p, wanted, device, stream)
                       : attention_forward<Bfloat16, kHeadDim>(p, wanted, device, stream);
          },
          [](Type type, const BackwardParams& p, const DeviceLimits&, void* stream) {
            return type == Type::kHalf ? attention_backward<Half, kHeadDim>(p, stream)
                                       : attention_backward<Bfloat16, kHeadDim>(p, stream);
          },
          attention_splits<kHeadDim>,
          [](KernelInfo* out, int capacity) {
            KernelList list(out, capacity);
            list.template add_all<Half, kHeadDim>("fp16");
            list.template add_all<Bfloat16, kHeadDim>("bf16");
            return list.count();
          }};
}
}  // namespace diffusion_fast
