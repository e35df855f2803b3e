// The device vocabulary of ../device.cuh, on the host. Included by it alone.
#pragma once
#include "fragments.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::diffusion_fast::emulator::block->current->index)
#define blockIdx (::diffusion_fast::emulator::block->index)
#define gridDim (::diffusion_fast::emulator::block->grid)

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace diffusion_fast::emulator {
enum Operation { kSyncwarp, kShuffle, kLdmatrix = 16, kMma = 32, kWgmma = 64 };

inline Report report;    // of every launch since the start
inline Options options;  // of the next launches
}  // namespace diffusion_fast::emulator

inline void __syncthreads(DIFFUSION_FAST_AT) { diffusion_fast::emulator::block_barrier(line); }

inline void __syncwarp(DIFFUSION_FAST_AT) {
  using namespace diffusion_fast::emulator;
  warp_collective(kSyncwarp, nullptr, "__syncwarp", line, [](Warp& w, void**) {
    ++w.epoch;
    if (block->clocks.on()) block->clocks.meet(lanes_of(block->current->warp));
  });
}

inline float __shfl_xor_sync(unsigned mask, float value, int lanes, DIFFUSION_FAST_AT) {
  using namespace diffusion_fast::emulator;
  struct Exchange {
    float in, out;
    int lanes;
  } mine{value, 0.f, lanes};
  if (mask != ~0u) fail("shuffle with a partial mask");
  warp_collective(kShuffle, &mine, "__shfl_xor_sync", line, [](Warp&, void** a) {
    for (int lane = 0; lane < 32; ++lane) {
      Exchange& e = *static_cast<Exchange*>(a[lane]);
      e.out = static_cast<Exchange*>(a[(lane ^ e.lanes) & 31])->in;
    }
  });
  return mine.out;
}

namespace diffusion_fast::ptx {

inline uint32_t shared_base() { return emulator::kSharedBase; }

inline void cp_async16(uint32_t to, const void* from, bool valid, DIFFUSION_FAST_AT) {
  emulator::Thread& me = *emulator::block->current;
  uint8_t* target = emulator::shared_at(to, 16, line);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    emulator::fail("cp.async source misaligned, line " + std::to_string(line));
  emulator::on_write(to, 16, me, line, emulator::Access::kInFlight);
  memset(target, 0xff, 16);
  me.copies.push_back({to, from, valid, me.groups});
  ++emulator::report.cp_async;
}
inline void cp_async_commit() { ++emulator::block->current->groups; }
template <int kPending>
void cp_async_wait() {
  emulator::Thread& me = *emulator::block->current;
  size_t landed = 0;
  while (landed < me.copies.size() && me.copies[landed].group < me.groups - kPending)
    emulator::land(me.copies[landed++], me);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

inline void store_shared32(uint32_t to, uint32_t value, DIFFUSION_FAST_AT) {
  uint8_t* target = emulator::shared_at(to, 4, line);
  emulator::on_store(to, *emulator::block->current, line);
  memcpy(target, &value, 4);
}
inline void store_shared_float(uint32_t to, float value, DIFFUSION_FAST_AT) {
  store_shared32(to, emulator::float_bits(value), line);
}
inline float2 load_shared_float2(uint32_t from, DIFFUSION_FAST_AT) {
  float2 v;
  memcpy(&v, emulator::shared_at(from, 8, line), 8);
  emulator::on_read(from, 8, *emulator::block->current, line);
  return v;
}
inline uint4 load_shared128(uint32_t from, DIFFUSION_FAST_AT) {
  uint4 v;
  memcpy(&v, emulator::shared_at(from, 16, line), 16);
  emulator::on_read(from, 16, *emulator::block->current, line);
  return v;
}

template <int kBlocks, bool kTransposed>
void ldmatrix(uint32_t* r, uint32_t from, int line) {
  emulator::LdmatrixArgument mine{r, from};
  const int warp = emulator::block->current->warp;
  emulator::warp_collective(emulator::kLdmatrix + kBlocks * 2 + kTransposed, &mine, "ldmatrix",
                            line, [=](emulator::Warp&, void** a) {
                              emulator::execute_ldmatrix<kBlocks, kTransposed>(warp, a, line);
                            });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t from, DIFFUSION_FAST_AT) {
  ldmatrix<4, false>(r, from, line);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t from, DIFFUSION_FAST_AT) {
  ldmatrix<4, true>(r, from, line);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t from, DIFFUSION_FAST_AT) {
  ldmatrix<2, false>(r, from, line);
}
inline void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t from, DIFFUSION_FAST_AT) {
  ldmatrix<2, true>(r, from, line);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  DIFFUSION_FAST_AT) {
  emulator::MmaArgument mine{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::warp_collective(emulator::kMma + 16, &mine, "mma.m16n8k16", line,
                            [](emulator::Warp&, void** v) { emulator::execute_mma<T, 16>(v); });
}
template <typename T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b0, DIFFUSION_FAST_AT) {
  emulator::MmaArgument mine{d, {a[0], a[1], 0, 0}, {b0, 0}};
  emulator::warp_collective(emulator::kMma + 8, &mine, "mma.m16n8k8", line,
                            [](emulator::Warp&, void** v) { emulator::execute_mma<T, 8>(v); });
}

template <typename T>
uint32_t pack(float low, float high) {
  return emulator::to_bits(low, T{}) | static_cast<uint32_t>(emulator::to_bits(high, T{})) << 16;
}
template <typename T>
float to_float(uint16_t bits) {
  return emulator::from_bits(bits, T{});
}
inline float exp2_approximate(float x) { return std::exp2(x); }
inline uint32_t bits_of(float x) { return emulator::float_bits(x); }
inline float float_of(uint32_t bits) { return emulator::bits_float(bits); }
inline float max_or_nan(float x, float y) { return x != x || y != y ? NAN : x < y ? y : x; }

// Runs every block to its end, one after the other; errors go to emulator::report.
template <typename Params>
const char* launch(void (*kernel)(Params), unsigned blocks, int threads, int shared_bytes,
                   const Params& params, void*) {
  static emulator::Block block;
  block.options = emulator::options;
  block.report = &emulator::report;
  block.seen.clear();
  block.grid = {blocks, 1, 1};
  emulator::report.blocks = blocks;
  emulator::report.shared_bytes = shared_bytes;
  block.shared.resize(shared_bytes);
  block.words.resize(emulator::options.races ? (shared_bytes + 3) / 4 : 0);
  block.body = [&] { kernel(params); };
  for (unsigned i = 0; i < blocks && emulator::report.errors.empty(); ++i) {
    block.index = {i, 0, 0};
    emulator::run_block(block, threads);
  }
  return nullptr;
}

}  // namespace diffusion_fast::ptx

#include "hopper.h"  // IWYU pragma: export
