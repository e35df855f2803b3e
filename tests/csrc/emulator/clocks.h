// Who has seen what: vector clocks, for kernels whose barriers order any set of threads (mbarriers,
// named barriers).
//
// Off until the first mbarrier is made: __syncthreads and __syncwarp alone are cheaper to follow by
// counting them. Besides the threads, the copy engine has a place in a clock, and so has each warp
// for the reads of its wgmma.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace diffusion_fast::emulator {

class Clocks {
 public:
  bool on() const { return width_ != 0; }
  void stop() { width_ = 0; }
  void start(int threads) {
    if (on()) return;
    threads_ = threads;
    width_ = static_cast<size_t>(threads + threads / 32 + 1);
    time_.assign(width_ * threads, 0);
    for (int t = 0; t < threads; ++t) of(t)[t] = 1;
  }
  uint32_t* of(int thread) { return time_.data() + thread * width_; }
  int products_of(int warp) const { return threads_ + warp; }
  int engine() const { return static_cast<int>(width_) - 1; }
  std::vector<uint32_t> nothing() const { return std::vector<uint32_t>(width_, 0); }

  void learn(uint32_t* to, const uint32_t* from) const {
    for (size_t i = 0; i < width_; ++i) to[i] = std::max(to[i], from[i]);
  }
  void tick(int thread) { ++of(thread)[thread]; }
  // All that any of them has seen, all of them have seen.
  template <class Threads>
  void meet(const Threads& threads) {
    if (!on()) return;
    std::vector<uint32_t> all = nothing();
    for (int t : threads) learn(all.data(), of(t));
    for (int t : threads) {
      std::copy(all.begin(), all.end(), of(t));
      tick(t);
    }
  }

 private:
  int threads_ = 0;
  size_t width_ = 0;
  std::vector<uint32_t> time_;
};

}  // namespace diffusion_fast::emulator
