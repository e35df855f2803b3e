// Any number of keys, on sm_90a: wgmma for both products, tiles brought by the copy engine (TMA),
// one warpgroup that asks for them and two that compute, as in FlashAttention-3 (arXiv:2407.08608).
// Of a warpgroup's own tiles the products of one run while the softmax of the next is computed.
#pragma once
#include <algorithm>

#include "exponential.cuh"
#include "params.h"
#include "softmax.cuh"

namespace diffusion_fast {

struct HopperParams {
  ForwardParams forward;
  TensorMap q, k, v;
};

constexpr int kWarpgroup = 128;

template <int kHeadDim>
struct HopperShape {
  static constexpr int kGroups = 2, kGroupRows = 64,
                       kRows = kGroups * kGroupRows;  // queries of a block
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kKeys = 128;
  // wgmma takes 16 values of the head dim at a time: 40 becomes 48, the copy engine adds zeros. The
  // swizzle is the widest one whose spans fill a row, so that operands are whole swizzle atoms in
  // both products.
  static constexpr int kColumns = (kHeadDim + 15) / 16 * 16;
  static constexpr int kSwizzle = kColumns % 64 == 0 ? 128 : kColumns % 32 == 0 ? 64 : 32;  // bytes
  static constexpr int kBoxColumns = kSwizzle / 2, kBoxes = kColumns / kBoxColumns;
  static constexpr int kTile = kKeys * kColumns * 2;  // bytes of K or of V
  static constexpr int kQuery = kGroupRows * kColumns * 2;
  // One warpgroup's queries, later its outputs in rows of store_rows().
  static constexpr int kOwn =
      (std::max(kQuery, kGroupRows* Rows<kHeadDim>::kStride) + 1023) / 1024 * 1024;
  static constexpr int kSlots = kHeadDim <= 96 ? 6 : 4;  // tiles on chip, of K and V alike
  static constexpr int kAlignment = 1024;                // of the widest swizzle's pattern
  static constexpr int kBarriers = kGroups * kOwn + kSlots * kTile;
  static constexpr int kShared = kAlignment + kBarriers + 8 * (2 * kSlots + kGroups);
  static_assert(kShared <= 227 << 10, "fits a multiprocessor of sm_90");
  // Of 168 per thread at the start; the sum over three warpgroups stays.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
};

// Addresses in shared memory.
template <int kHeadDim>
struct HopperMemory {
  using Shape = HopperShape<kHeadDim>;
  uint32_t base =
      (ptx::shared_base() + Shape::kAlignment - 1) / Shape::kAlignment * Shape::kAlignment;
  __device__ __forceinline__ uint32_t own(int group) const { return base + group * Shape::kOwn; }
  __device__ __forceinline__ uint32_t slot(int i) const {
    return base + Shape::kGroups * Shape::kOwn + i * Shape::kTile;
  }
  // mbarriers: a slot is full, is empty again, a warpgroup's queries are there
  __device__ __forceinline__ uint32_t full(int i) const { return base + Shape::kBarriers + i * 8; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(Shape::kSlots + i); }
  __device__ __forceinline__ uint32_t queries(int group) const {
    return full(2 * Shape::kSlots + group);
  }
};

// A place in the sequence of tiles, which the producer and the consumers walk through alike. In the
// order of use that is K0, K1, V0, K2, V1, ... with the last V at the end; tile n of the sequence
// lies in slot n % kSlots.
template <int kSlots>
struct Ring {
  int slot = 0, round = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      round ^= 1;
    }
  }
};

// Descriptors of operands in shared memory, PTX ISA 9.7.15.5.1.2.2: start, leading and stride byte
// offset (each / 16) and the swizzle. `leading` says where the next swizzle span of columns lies,
// `stride` the next 8 rows.
// mutants: hopper: descriptor
template <int kSwizzle>
__device__ __forceinline__ uint64_t descriptor(uint32_t start, uint32_t leading) {
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
  constexpr uint64_t kStride = 8 * kSwizzle;
  return static_cast<uint64_t>((start & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         kStride >> 4 << 32 | kMode << 62;
}

// S = Q K^T. The columns of both are walked in steps of 16, 32 bytes inside a swizzle span and its
// pattern. The leading offset is not used here (by convention 1).
// mutants: hopper: scores
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_queries(float* s, uint32_t q, uint32_t k) {
  using Shape = HopperShape<kHeadDim>;
#pragma unroll
  for (int step = 0; step < Shape::kColumns / 16; ++step) {
    const int box = step * 32 / Shape::kSwizzle, within = step * 32 % Shape::kSwizzle;
    const uint32_t from_q = q + box * Shape::kGroupRows * Shape::kSwizzle + within;
    const uint32_t from_k = k + box * Shape::kKeys * Shape::kSwizzle + within;
    ptx::wgmma_shared<T, Shape::kKeys>(s, descriptor<Shape::kSwizzle>(from_q, 16),
                                       descriptor<Shape::kSwizzle>(from_k, 16), step > 0);
  }
}

// O += P V, over the keys in steps of 16.
// mutants: hopper: values
template <typename T, int kHeadDim, int kSteps>
__device__ __forceinline__ void multiply_values(float* o, const Rounded<> (&p)[kSteps],
                                                uint32_t v) {
  using Shape = HopperShape<kHeadDim>;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::wgmma_registers<T, Shape::kColumns>(
        o, p[step].x[0],
        descriptor<Shape::kSwizzle>(v + step * 16 * Shape::kSwizzle,
                                    Shape::kKeys * Shape::kSwizzle));
}

// As exponentiate() of softmax.cuh, with one of kPeriod exponentials on the FMA units.
template <int kPeriod>
__device__ __forceinline__ void exponentiate_shared(Scores<>& s, float log2_scale,
                                                    const float (&base)[1][2], float (&sum)[1][2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = s.x[0][n][e];
      const float exponent = fmaf(x, log2_scale, -base[0][e >> 1]);
      x = (n * 4 + e) % kPeriod == kPeriod - 1 ? exp2_polynomial(exponent)
                                               : ptx::exp2_approximate(exponent);
      sum[0][e >> 1] += x;
    }
}

// The part of a warpgroup's state that belongs to the softmax; a thread holds two rows.
// mutants: hopper: softmax
struct HopperRows {
  float maximum[1][2] = {{-INFINITY, -INFINITY}}, base[1][2] = {}, sum[1][2] = {};

  // Turns scores into probabilities; what was summed before this tile shrinks by `shrink`.
  template <int kTiles>
  __device__ __forceinline__ void softmax(Scores<> (&s)[kTiles], float log2_scale,
                                          float (&shrink)[2]) {
    constexpr int kPolynomialPeriod =
        4;  // 8 cycles of the special-function unit to some 9 issued instructions: a quarter
    const float before[2] = {maximum[0][0], maximum[0][1]};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) update_max(maximum, s[j]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maximum[0][r] = row_max(maximum[0][r]);
      base[0][r] = exponent_base(maximum[0][r], log2_scale);
      shrink[r] = ptx::exp2_approximate(fmaf(before[r], log2_scale, -base[0][r]));
      sum[0][r] *= shrink[r];
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      exponentiate_shared<kPolynomialPeriod>(s[j], log2_scale, base, sum);
  }
};

// One thread asks for everything the block reads.
// mutants: hopper: producer
template <int kHeadDim>
__device__ __forceinline__ void produce(const HopperParams& params, const Place& place, int tiles) {
  using Shape = HopperShape<kHeadDim>;
  const ForwardParams& p = params.forward;
  const HopperMemory<kHeadDim> memory;
  // Dims that are broadcast have size 1 in the map.
  auto load = [&](const TensorMap& map, const Strides& strides, uint32_t to, uint32_t barrier,
                  int row, int rows) {
    const int head = strides.head == 0 ? 0 : place.head,
              batch = strides.batch == 0 ? 0 : place.batch;
    ptx::mbarrier_arrive_and_expect(barrier, rows * Shape::kColumns * 2);
#pragma unroll 1
    for (int box = 0; box < Shape::kBoxes; ++box)
      ptx::load_box(to + box * rows * Shape::kSwizzle, map, barrier, box * Shape::kBoxColumns, row,
                    head, batch);
  };
  Ring<Shape::kSlots> ring;
  auto load_tile = [&](const TensorMap& map, const Strides& strides, int tile) {
    ptx::mbarrier_wait(memory.empty(ring.slot), ring.round ^ 1);
    load(map, strides, memory.slot(ring.slot), memory.full(ring.slot), tile * Shape::kKeys,
         Shape::kKeys);
    ring.advance();
  };
#pragma unroll 1
  for (int group = 0; group < Shape::kGroups; ++group)
    load(params.q, p.q_strides, memory.own(group), memory.queries(group),
         place.part * Shape::kRows + group * Shape::kGroupRows, Shape::kGroupRows);
  if (tiles > 0) load_tile(params.k, p.k_strides, 0);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load_tile(params.k, p.k_strides, tile + 1);
    load_tile(params.v, p.v_strides, tile);
  }
}

// V times a probability of 0 must be 0, so rows of V past the length, which may hold NaN, become
// zeros.
// mutants: hopper: cleared values
template <int kHeadDim>
__device__ __forceinline__ void clear_values(uint32_t v, int from, int worker) {
  using Shape = HopperShape<kHeadDim>;
  const int words = (Shape::kKeys - from) * Shape::kSwizzle / 4;
#pragma unroll 1
  for (int i = worker; i < Shape::kBoxes * words; i += Shape::kGroups * kWarpgroup)
    ptx::store_shared32(v + (i / words * Shape::kKeys + from) * Shape::kSwizzle + i % words * 4, 0);
  ptx::proxy_fence();
}

// What one warpgroup computes: 64 queries.
// mutants: hopper: consumer
template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const HopperParams& params, const Place& place, int group,
                                        int keys, int tiles) {
  using Shape = HopperShape<kHeadDim>;
  constexpr int kTiles = Shape::kKeys / 16;
  const ForwardParams& p = params.forward;
  const HopperMemory<kHeadDim> memory;
  const float* bias = p.bias == nullptr ? nullptr : place.at(p.bias, p.bias_batch, p.bias_head);
  const float log2_scale = p.scale * kLog2E, inverse_scale = 1.f / p.scale;
  const int lane = lane_id(), warp = warp_id() & 3;

  Scores<> s[kTiles];
  Rounded<> probabilities[kTiles];
  Accumulator<Shape::kColumns> o;
  HopperRows rows;
  float shrink[2];
  float *scores = &s[0].x[0][0][0], *outputs = &o.x[0][0][0];

  auto pin_scores = [&] {
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 2; ++i) ptx::pin(scores[i]);
  };
  auto pin_values = [&] {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) ptx::pin(outputs[i]);
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) ptx::pin(probabilities[i / 4].x[0][i % 4]);
  };
  Ring<Shape::kSlots> ring;
  auto arrived = [&] {
    ptx::mbarrier_wait(memory.full(ring.slot), ring.round);
    return memory.slot(ring.slot);
  };
  auto release = [&](int slot) {  // each warp for itself: that its own part of a product is done
                                  // says nothing of the others
    if (lane == 0) ptx::mbarrier_arrive(memory.empty(slot));
  };
  auto softmax = [&](int tile) {
    if (bias != nullptr || (tile + 1) * Shape::kKeys > keys) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        bias_and_mask(s[j], bias, inverse_scale, tile * Shape::kKeys + j * 16, keys);
    }
    rows.softmax(s, log2_scale, shrink);
  };
  auto round_scores = [&] {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) probabilities[j] = round_to<T>(s[j]);
  };

  ptx::mbarrier_wait(memory.queries(group), 0);
  if (tiles > 0) {
    const uint32_t first = arrived();
    pin_scores();
    ptx::wgmma_fence();
    multiply_queries<T, kHeadDim>(scores, memory.own(group), first);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin_scores();
    release(ring.slot);
    ring.advance();
    softmax(0);
    round_scores();

#pragma unroll 1
    for (int tile = 0; tile + 1 < tiles; ++tile) {
      const int slot_k = ring.slot;
      const uint32_t k = arrived();
      pin_scores();
      pin_values();
      ptx::wgmma_fence();
      multiply_queries<T, kHeadDim>(scores, memory.own(group), k);  // of the next tile
      ptx::wgmma_commit();
      ring.advance();
      const int slot_v = ring.slot;
      const uint32_t v = arrived();
      ptx::wgmma_fence();
      multiply_values<T, kHeadDim>(outputs, probabilities, v);  // of this one
      ptx::wgmma_commit();
      ring.advance();
      ptx::wgmma_wait<1>();
      pin_scores();
      release(slot_k);
      softmax(tile + 1);
      ptx::wgmma_wait<0>();
      pin_values();
      release(slot_v);
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 2; ++i) outputs[i] *= shrink[i >> 1 & 1];
      round_scores();
    }

    const uint32_t v = arrived();
    if (keys < p.keys && tiles * Shape::kKeys > keys) {
      clear_values<kHeadDim>(v, keys - (tiles - 1) * Shape::kKeys, threadIdx.x - kWarpgroup);
      ptx::named_barrier(1, Shape::kGroups * kWarpgroup);
    }
    pin_values();
    ptx::wgmma_fence();
    multiply_values<T, kHeadDim>(outputs, probabilities, v);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin_values();
  }

  ptx::named_barrier(
      2 + group, kWarpgroup);  // all four warps have read their queries: outputs take their place
  const int first = place.part * Shape::kRows + group * Shape::kGroupRows + warp * 16;
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.sum[0][r] = row_sum(rows.sum[0][r]);
  const float factor[2] = {inverse_or_zero(rows.sum[0][0]), inverse_or_zero(rows.sum[0][1])};
  float x[kHeadDim / 8][4];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) x[i / 4][i % 4] = outputs[i];
  T* out = place.at(static_cast<T*>(p.out), p.out_strides.batch, p.out_strides.head);
  const uint32_t stage = memory.own(group) + warp * 16 * Rows<kHeadDim>::kStride;
  store_rows<T, kHeadDim>(out, p.out_strides.row, first, p.queries, stage, x, factor);
  if (p.lse == nullptr || (lane & 3) != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = first + (lane >> 2) + r * 8;
    if (at < p.queries)
      p.lse[place.batch_head * p.queries + at] = log_sum_exp(rows.base[0][r], rows.sum[0][r]);
  }
}

// mutants: hopper: start
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ptx::kHopper ? HopperShape<kHeadDim>::kThreads : 32, 1)
    attention_hopper(const __grid_constant__ HopperParams params) {
  if constexpr (ptx::kHopper) {
    using Shape = HopperShape<kHeadDim>;
    const ForwardParams& p = params.forward;
    const Place place((p.queries + Shape::kRows - 1) / Shape::kRows, p.heads);
    const int keys = key_count(p.key_lengths, place.batch, p.keys),
              tiles = (keys + Shape::kKeys - 1) / Shape::kKeys;
    if (threadIdx.x == 0) {
      const HopperMemory<kHeadDim> memory;
      for (int i = 0; i < Shape::kSlots; ++i) {
        ptx::mbarrier_init(memory.full(i), 1);
        ptx::mbarrier_init(memory.empty(i), Shape::kGroups * 4);
      }
      for (int group = 0; group < Shape::kGroups; ++group)
        ptx::mbarrier_init(memory.queries(group), 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
      ptx::release_registers<Shape::kProducerRegisters>();
      if (threadIdx.x == 0) produce<kHeadDim>(params, place, tiles);
    } else {
      ptx::claim_registers<Shape::kConsumerRegisters>();
      consume<T, kHeadDim>(params, place, static_cast<int>(threadIdx.x) / kWarpgroup - 1, keys,
                           tiles);
    }
  }
}

}  // namespace diffusion_fast
