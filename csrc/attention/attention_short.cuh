// Short keys: K and V of one head stay on chip whole, the scores of 16 query rows in the registers
// of one warp, so the softmax is one pass and nothing is rescaled. Blocks walk over query tiles;
// the next tile's queries load meanwhile.
#pragma once
#include <type_traits>

#include "params.h"
#include "softmax.cuh"

namespace diffusion_fast {

// At most kKeyTiles tiles of 16 keys; those past the keys are skipped, so that work is padded to 16
// keys and no further.
template <int kHeadDim, int kKeyTiles>
struct ShortShape {
  static constexpr int kRows = kWarps * 16;
  static constexpr int shared_bytes(int keys) {
    const int padded = (keys + 15) / 16 * 16;
    return (2 * padded + 2 * kRows) * Rows<kHeadDim>::kStride;
  }
  // Queries stay in registers, except where the scores leave no room for them.
  using Operand = std::conditional_t<kHeadDim * kKeyTiles <= 128 * 16, RegisterOperand<kHeadDim>,
                                     SharedOperand<kHeadDim>>;
  // Blocks per multiprocessor that the registers must allow.
  static constexpr int kBlocks = kKeyTiles <= 5                      ? (kHeadDim <= 96 ? 4 : 3)
                                 : kKeyTiles <= 10 && kHeadDim <= 64 ? 3
                                                                     : 2;
};

template <typename T, int kHeadDim, int kKeyTiles>
__global__ void __launch_bounds__(kThreads, ShortShape<kHeadDim, kKeyTiles>::kBlocks)
    attention_short(const __grid_constant__ ForwardParams params) {
  using R = Rows<kHeadDim>;
  using Operand = typename ShortShape<kHeadDim, kKeyTiles>::Operand;
  constexpr int kRows = ShortShape<kHeadDim, kKeyTiles>::kRows;
  const Place place(params.blocks_per_head, params.heads);
  const int lane = lane_id(), warp = warp_id();
  // mutants: short: places
  const int keys = key_count(params.key_lengths, place.batch, params.keys),
            padded = (keys + 15) / 16 * 16;
  const int tiles = (params.queries + kRows - 1) / kRows;
  const T* q =
      place.at(static_cast<const T*>(params.q), params.q_strides.batch, params.q_strides.head);
  const T* k =
      place.at(static_cast<const T*>(params.k), params.k_strides.batch, params.k_strides.head);
  const T* v =
      place.at(static_cast<const T*>(params.v), params.v_strides.batch, params.v_strides.head);
  T* out = place.at(static_cast<T*>(params.out), params.out_strides.batch, params.out_strides.head);
  const float* bias =
      params.bias == nullptr ? nullptr : place.at(params.bias, params.bias_batch, params.bias_head);

  const uint32_t shared_k = ptx::shared_base(), shared_v = shared_k + padded * R::kStride;
  const uint32_t shared_q =
      shared_v + (padded + warp * 16) * R::kStride;  // this warp's rows, first of two buffers
  auto q_buffer = [&](int i) { return shared_q + (i & 1) * kRows * R::kStride; };
  auto load_q = [&](int tile, int i) {
    load_rows<T, kHeadDim>(q_buffer(i), q, params.q_strides.row, tile * kRows + warp * 16, 16,
                           params.queries, lane, 32);
  };

  // mutants: short: copies
  load_q(place.part, 0);
  load_rows<T, kHeadDim>(shared_k, k, params.k_strides.row, 0, padded, keys, threadIdx.x, kThreads);
  ptx::cp_async_commit();
  load_rows<T, kHeadDim>(shared_v, v, params.v_strides.row, 0, padded, keys, threadIdx.x, kThreads);
  ptx::cp_async_commit();

  const float log2_scale = params.scale * kLog2E, inverse_scale = 1.f / params.scale;
  int i = 0;
  for (int tile = place.part; tile < tiles; tile += params.blocks_per_head, ++i) {
    if (tile + params.blocks_per_head < tiles) load_q(tile + params.blocks_per_head, i + 1);
    ptx::cp_async_commit();
    // mutants: short: Q and K
    if (i == 0) {
      ptx::cp_async_wait<2>();  // Q and K; V and the next Q may still be on their way
      __syncthreads();
    } else {
      ptx::cp_async_wait<1>();
      __syncwarp();
    }

    // mutants: short: scores
    // S = Q K^T
    Scores<> s[kKeyTiles];
    {
      const Operand operand(SharedOperand<kHeadDim>{q_buffer(i)});
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
        if (j * 16 < keys)
          multiply_transposed<T, kHeadDim, 1, 1>(s + j, operand, shared_k + j * 16 * R::kStride);
    }

    // mutants: short: softmax
    // P = 2^(c S - base), unnormalised
    Rounded<> p[kKeyTiles];
    float maximum[1][2] = {{-INFINITY, -INFINITY}}, base[1][2], sum[1][2] = {};
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      if (j * 16 >= keys) continue;
      if (bias != nullptr || (j + 1) * 16 > keys)
        bias_and_mask(s[j], bias, inverse_scale, j * 16, keys);
      update_max(maximum, s[j]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) base[0][r] = exponent_base(row_max(maximum[0][r]), log2_scale);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      if (j * 16 >= keys) continue;
      exponentiate(s[j], log2_scale, base, sum);
      p[j] = round_to<T>(s[j]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[0][r] = row_sum(sum[0][r]);

    // mutants: short: output
    if (i == 0) {
      ptx::cp_async_wait<1>();  // V
      __syncthreads();
    }

    // O = P V / sum
    Accumulator<kHeadDim> o;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
      if (j * 16 < keys) accumulate<T>(o, p[j], shared_v + j * 16 * R::kStride);
    const int first = tile * kRows + warp * 16;
    const float factor[2] = {inverse_or_zero(sum[0][0]), inverse_or_zero(sum[0][1])};
    // The lane that reads a staged piece back is the one that loads over it two rounds on: no
    // barrier between.
    store_rows<T, kHeadDim>(out, params.out_strides.row, first, params.queries, q_buffer(i), o.x[0],
                            factor);
    if (params.lse != nullptr && (lane & 3) == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first + (lane >> 2) + r * 8;
        if (row < params.queries)
          params.lse[place.batch_head * params.queries + row] = log_sum_exp(base[0][r], sum[0][r]);
      }
    }
  }
}

}  // namespace diffusion_fast
