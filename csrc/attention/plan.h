// Which kernel runs with which tile, from the shape and the device alone. Plain C++: tested without
// a GPU.
#pragma once
#include <algorithm>
#include <cstdint>

namespace diffusion_fast {

struct DeviceLimits {
  int multiprocessors = 1;
  int shared_per_block = 99 << 10;            // bytes, opt-in
  int shared_per_multiprocessor = 100 << 10;  // bytes
};

// kHopper runs when asked for by name only: it has not been timed against the others yet.
enum class ForwardKernel { kAuto = 0, kShort = 1, kTiled = 2, kHopper = 3 };

// Keys the short-key kernels are compiled for: one, two or three prompts of 77 tokens; fewer keys
// skip tiles.
constexpr int kShortKeyTiles[] = {5, 10, 16};
constexpr int kMaxShortKeys = 16 * 16;

struct ForwardPlan {
  ForwardKernel kernel;
  int key_tiles;     // short only: which instance
  int shared_bytes;  // short only
  int blocks_per_head;
};

// 1 KiB of each block's shared memory belongs to the system.
inline int resident_blocks(int shared_bytes, const DeviceLimits& device) {
  constexpr int kSystem = 1 << 10,
                kMost = 4;  // 4 blocks of 4 warps fill the registers at 128 per thread
  return std::max(1, std::min(kMost, device.shared_per_multiprocessor / (shared_bytes + kSystem)));
}

// `row_bytes`: of one row in shared memory. `rows`: query rows of a block's tile.
inline ForwardPlan plan_forward(int row_bytes, int rows, int64_t batch_heads, int queries, int keys,
                                ForwardKernel wanted, const DeviceLimits& device) {
  constexpr int kSmall = 80;
  const int tiles = (queries + rows - 1) / rows, padded = (keys + 15) / 16 * 16;
  const int shared = (2 * padded + 2 * rows) * row_bytes;
  const bool fits = keys <= kMaxShortKeys && shared <= device.shared_per_block;
  // Past one prompt the short kernel must leave room for a second block, or nothing hides its
  // loads.
  const bool fast = keys <= kSmall || 2 * (shared + (1 << 10)) <= device.shared_per_multiprocessor;
  if (!fits || wanted == ForwardKernel::kTiled || (wanted == ForwardKernel::kAuto && !fast))
    return {ForwardKernel::kTiled, 0, 0, 0};
  int key_tiles = 0;
  for (int t : kShortKeyTiles)
    if (key_tiles == 0 && t * 16 >= keys) key_tiles = t;
  // One wave: as many blocks as fit the device at once, each with the same number of query tiles up
  // to one.
  const int64_t resident =
      static_cast<int64_t>(resident_blocks(shared, device)) * device.multiprocessors;
  const int64_t wave = std::max<int64_t>(1, std::min<int64_t>(tiles, resident / batch_heads));
  const int per_block = static_cast<int>((tiles + wave - 1) / wave);
  return {ForwardKernel::kShort, key_tiles, shared, (tiles + per_block - 1) / per_block};
}

// Delta from P and dP where keys are few (see attention_backward.cuh); past that rowsum(out dout),
// as in FlashAttention-2.
inline bool plan_exact_delta(int keys) { return keys <= kMaxShortKeys; }

// How many blocks share the queries of one tile of keys in the backward pass: one where the keys
// alone fill the device (then dK and dV need no second pass), else enough for two waves, but at
// least four query tiles each.
inline int plan_splits(int key_tiles, int query_tiles, int64_t batch_heads,
                       const DeviceLimits& device) {
  const int64_t blocks = batch_heads * key_tiles,
                wanted = 2 * static_cast<int64_t>(device.multiprocessors);
  if (blocks * 2 > wanted) return 1;
  const int64_t splits = std::min<int64_t>(wanted / std::max<int64_t>(blocks, 1), query_tiles / 4);
  if (splits <= 1) return 1;
  const int share = static_cast<int>((query_tiles + splits - 1) / splits);
  return (query_tiles + share - 1) / share;
}

}  // namespace diffusion_fast
