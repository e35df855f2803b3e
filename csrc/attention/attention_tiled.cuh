// Any number of keys: online softmax over tiles of keys (Milakov and Gimelshein 2018,
// arXiv:1805.02867; as FlashAttention, arXiv:2205.14135 and 2307.08691). Two stages of K and V:
// while one is used the next loads, one barrier per tile.
#pragma once
#include "params.h"
#include "softmax.cuh"

namespace diffusion_fast {

template <int kHeadDim>
struct TiledShape {
  // 32 rows per warp halve the shared-memory reads of K and V per product; above 64 the registers
  // do not allow it.
  static constexpr int kM = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kRows = kWarps * 16 * kM;
  static constexpr int kKeys =
      kHeadDim <= 80 ? 64 : 32;  // per stage; two blocks then fit the 100 KB of consumer cards
  static constexpr int kStage = 2 * kKeys * Rows<kHeadDim>::kStride;
  static constexpr int kShared = 2 * kStage;
  static_assert(kRows <= 2 * kKeys, "queries and outputs pass through one stage");
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_tiled(const __grid_constant__ ForwardParams p) {
  using R = Rows<kHeadDim>;
  using Shape = TiledShape<kHeadDim>;
  constexpr int kM = Shape::kM, kKeys = Shape::kKeys, kColumns = kKeys / 16;
  const Place place((p.queries + Shape::kRows - 1) / Shape::kRows, p.heads);
  const int lane = lane_id(), warp = warp_id();
  const int keys = key_count(p.key_lengths, place.batch, p.keys),
            tiles = (keys + kKeys - 1) / kKeys;
  const int first = place.part * Shape::kRows + warp * kM * 16;  // this warp's first query
  const T* q = place.at(static_cast<const T*>(p.q), p.q_strides.batch, p.q_strides.head);
  const T* k = place.at(static_cast<const T*>(p.k), p.k_strides.batch, p.k_strides.head);
  const T* v = place.at(static_cast<const T*>(p.v), p.v_strides.batch, p.v_strides.head);
  T* out = place.at(static_cast<T*>(p.out), p.out_strides.batch, p.out_strides.head);
  const float* bias = p.bias == nullptr ? nullptr : place.at(p.bias, p.bias_batch, p.bias_head);

  // mutants: tiled: places
  auto stage = [&](int i) { return ptx::shared_base() + (i & 1) * Shape::kStage; };
  // Queries arrive in the stage of tile 1, which loads after the first barrier only, and stay in
  // registers. Outputs leave through the stage that the last tile left free.
  auto own_rows = [&](int i) { return stage(i) + warp * kM * 16 * R::kStride; };
  auto load_stage = [&](int tile) {
    load_rows<T, kHeadDim>(stage(tile), k, p.k_strides.row, tile * kKeys, kKeys, keys, threadIdx.x,
                           kThreads);
    load_rows<T, kHeadDim>(stage(tile) + kKeys * R::kStride, v, p.v_strides.row, tile * kKeys,
                           kKeys, keys, threadIdx.x, kThreads);
  };

  // mutants: tiled: queries
  load_rows<T, kHeadDim>(own_rows(1), q, p.q_strides.row, first, kM * 16, p.queries, lane, 32);
  ptx::cp_async_commit();
  if (tiles > 0) load_stage(0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncwarp();
  const RegisterOperand<kHeadDim, kM> operand(SharedOperand<kHeadDim, kM>{own_rows(1)});

  const float log2_scale = p.scale * kLog2E, inverse_scale = 1.f / p.scale;
  Accumulator<kHeadDim, kM> o;
  float maximum[kM][2], base[kM][2] = {}, sum[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) maximum[m][0] = maximum[m][1] = -INFINITY;

  // mutants: tiled: keys
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile has landed for all, and all are done with the other stage
    if (tile + 1 < tiles) load_stage(tile + 1);
    ptx::cp_async_commit();

    Scores<kM> s[kColumns];
    multiply_transposed<T, kHeadDim, kM, kColumns>(s, operand, stage(tile));
    if (bias != nullptr || (tile + 1) * kKeys > keys) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        bias_and_mask(s[j], bias, inverse_scale, tile * kKeys + j * 16, keys);
    }

    // With the new maximum, what was summed so far shrinks by 2^(old base - new base).
    float before[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) before[m][r] = maximum[m][r];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) update_max(maximum, s[j]);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        maximum[m][r] = row_max(maximum[m][r]);
        base[m][r] = exponent_base(maximum[m][r], log2_scale);
        const float shrink = ptx::exp2_approximate(fmaf(before[m][r], log2_scale, -base[m][r]));
        sum[m][r] *= shrink;
#pragma unroll
        for (int d = 0; d < R::kChunks; ++d) {
          o.x[m][d][2 * r] *= shrink;
          o.x[m][d][2 * r + 1] *= shrink;
        }
      }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) exponentiate(s[j], log2_scale, base, sum);
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      accumulate<T>(o, round_to<T>(s[j]), stage(tile) + (kKeys + j * 16) * R::kStride);
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int row = first + m * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[m][r] = row_sum(sum[m][r]);
    const float factor[2] = {inverse_or_zero(sum[m][0]), inverse_or_zero(sum[m][1])};
    store_rows<T, kHeadDim>(out, p.out_strides.row, row, p.queries,
                            own_rows(tiles) + m * 16 * R::kStride, o.x[m], factor);
    if (p.lse == nullptr || (lane & 3) != 0) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + (lane >> 2) + r * 8;
      if (at < p.queries)
        p.lse[place.batch_head * p.queries + at] = log_sum_exp(base[m][r], sum[m][r]);
    }
  }
}

}  // namespace diffusion_fast
