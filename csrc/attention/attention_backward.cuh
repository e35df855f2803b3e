// Gradients. With P = softmax(scale Q K^T + bias) and O = P V (arXiv:2205.14135, appendix B.2):
//
//   dV = P^T dO        dP = dO V^T        dS = P (dP - delta), delta = rowsum(O dO) = rowsum(P dP)
//   dQ = scale dS K    dK = scale dS^T Q  dbias = sum over queries of dS
//
// P is computed again from the log-sum-exp. With few keys one of them often takes nearly all of P,
// dP - delta cancels, and the rounding of O to 16 bits would show in dS: there delta is rowsum(P
// dP), two products and a pass over the keys more.
//
// Two kernels: one owns 64 keys per block and walks over the queries, one owns 64 queries and walks
// over the keys. That is 7 products in place of 5 (9 with the pass for delta), and in return no
// atomics and no float dQ in memory: every sum has one owner and one order, so results are always
// the same bit for bit.
#pragma once
#include "params.h"
#include "softmax.cuh"

namespace diffusion_fast {

// delta as rowsum(O dO), for many keys; 8 lanes per row.
// mutants: backward: delta
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_delta(const __grid_constant__ BackwardParams p) {
  constexpr int kLanes = 8, kRows = kThreads / kLanes;
  const Place place((p.queries + kRows - 1) / kRows, p.heads);
  const T* out = place.at(static_cast<const T*>(p.out), p.out_strides.batch, p.out_strides.head);
  const T* dout =
      place.at(static_cast<const T*>(p.dout), p.dout_strides.batch, p.dout_strides.head);
  const int row = place.part * kRows + threadIdx.x / kLanes;
  float sum = 0.f;
  if (row < p.queries)
    for (int d = threadIdx.x % kLanes * 8; d < kHeadDim; d += kLanes * 8) {
      const uint4 a = *reinterpret_cast<const uint4*>(out + row * p.out_strides.row + d);
      const uint4 b = *reinterpret_cast<const uint4*>(dout + row * p.dout_strides.row + d);
      const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum = fmaf(ptx::to_float<T>(x[i] & 0xffff), ptx::to_float<T>(y[i] & 0xffff), sum);
        sum = fmaf(ptx::to_float<T>(x[i] >> 16), ptx::to_float<T>(y[i] >> 16), sum);
      }
    }
  sum = row_sum(sum);
  sum += __shfl_xor_sync(0xffffffffu, sum, 4);
  if (row < p.queries && threadIdx.x % kLanes == 0)
    p.delta[place.batch_head * p.queries + row] = sum;
}

template <int kHeadDim>
struct BackwardShape {
  static constexpr int kOwn = kWarps * 16;                 // rows a block owns
  static constexpr int kOther = kHeadDim >= 96 ? 32 : 64;  // rows per stage of what it walks over
  static constexpr int kStep = kHeadDim >= 128 ? 16 : 32;  // of which are in registers at a time
  static constexpr int kRowBytes = Rows<kHeadDim>::kStride;
  static constexpr int kStatistics = kOther * 4;  // bytes of one float per row
  static constexpr int kOwnBytes = 2 * kOwn * kRowBytes, kStage = 2 * kOther * kRowBytes;
  static constexpr int kSharedQueries = kOwnBytes + 2 * kStage,
                       kSharedKeys = kSharedQueries + 4 * kStatistics;
};

// 2^(statistic) recovers P from scores: log2(e) lse. A row without any allowed key has lse -inf and
// P = 0.
// mutants: backward: probability
__device__ __forceinline__ float probability_base(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2E;
}

// dK, dV, dbias: rows of scores are this warp's 16 keys, columns the queries that pass by.
// mutants: backward: keys
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2)
    attention_backward_keys(const __grid_constant__ BackwardParams p) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kRow = Shape::kRowBytes, kQueries = Shape::kOther, kStep = Shape::kStep;
  const int key_tiles = (p.keys + Shape::kOwn - 1) / Shape::kOwn;
  const Place place(key_tiles * p.splits, p.heads);
  const int split = place.part / key_tiles, lane = lane_id(), warp = warp_id();
  const int block_first = place.part % key_tiles * Shape::kOwn, first = block_first + warp * 16;
  const int keys = key_count(p.key_lengths, place.batch, p.keys);
  const T* q = place.at(static_cast<const T*>(p.q), p.q_strides.batch, p.q_strides.head);
  const T* k = place.at(static_cast<const T*>(p.k), p.k_strides.batch, p.k_strides.head);
  const T* v = place.at(static_cast<const T*>(p.v), p.v_strides.batch, p.v_strides.head);
  const T* dout =
      place.at(static_cast<const T*>(p.dout), p.dout_strides.batch, p.dout_strides.head);

  // This block's query tiles: a contiguous share, and none where all its keys are masked.
  const int all_tiles = (p.queries + kQueries - 1) / kQueries,
            share = (all_tiles + p.splits - 1) / p.splits;
  const int begin = split * share,
            last = (split + 1) * share < all_tiles ? (split + 1) * share : all_tiles;
  const int end = block_first < keys ? last : begin;

  const uint32_t block_k = ptx::shared_base(), block_v = block_k + Shape::kOwn * kRow;
  const uint32_t shared_k = block_k + warp * 16 * kRow, shared_v = block_v + warp * 16 * kRow;
  auto stage = [&](int i) {
    return ptx::shared_base() + Shape::kOwnBytes + (i & 1) * Shape::kStage;
  };
  auto statistics = [&](int i) {
    return ptx::shared_base() + Shape::kSharedQueries + (i & 1) * 2 * Shape::kStatistics;
  };
  auto load_stage = [&](int tile) {
    const int at = tile * kQueries;
    load_rows<T, kHeadDim>(stage(tile), q, p.q_strides.row, at, kQueries, p.queries, threadIdx.x,
                           kThreads);
    load_rows<T, kHeadDim>(stage(tile) + kQueries * kRow, dout, p.dout_strides.row, at, kQueries,
                           p.queries, threadIdx.x, kThreads);
  };
  // Queries past the end get P = 0 through an infinite base.
  auto read_statistics = [&](int tile) {
    const int row = tile * kQueries + static_cast<int>(threadIdx.x);
    const bool valid = static_cast<int>(threadIdx.x) < kQueries && row < p.queries;
    const int64_t at = place.batch_head * p.queries + row;
    return float2{valid ? probability_base(p.lse[at]) : INFINITY, valid ? p.delta[at] : 0.f};
  };
  auto write_statistics = [&](int tile, float2 x) {
    if (static_cast<int>(threadIdx.x) >= kQueries) return;
    ptx::store_shared_float(statistics(tile) + threadIdx.x * 4, x.x);
    ptx::store_shared_float(statistics(tile) + Shape::kStatistics + threadIdx.x * 4, x.y);
  };

  load_rows<T, kHeadDim>(shared_k, k, p.k_strides.row, first, 16, keys, lane, 32);
  load_rows<T, kHeadDim>(shared_v, v, p.v_strides.row, first, 16, keys, lane, 32);
  if (begin < end) {
    load_stage(begin);
    write_statistics(begin, read_statistics(begin));
  }
  ptx::cp_async_commit();

  const float log2_scale = p.scale * kLog2E;
  float key_bias[2] = {}, dbias[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first + (lane >> 2) + r * 8;
    if (p.bias != nullptr && key < keys)
      key_bias[r] = place.at(p.bias, p.bias_batch, p.bias_head)[key] * kLog2E;
  }

  Accumulator<kHeadDim> dk, dv;
  for (int tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile has landed for all, and all are done with the other stage
    float2 next = {};
    if (tile + 1 < end) {
      load_stage(tile + 1);
      next = read_statistics(tile + 1);
    }
    ptx::cp_async_commit();

#pragma unroll 1
    for (int step = 0; step < kQueries; step += kStep) {
      const uint32_t rows_q = stage(tile) + step * kRow, rows_dout = rows_q + kQueries * kRow;
      Scores<> s[kStep / 16], ds[kStep / 16];
      multiply_transposed<T, kHeadDim, 1, kStep / 16>(s, SharedOperand<kHeadDim>{shared_k},
                                                      rows_q);  // S^T = K Q^T
      multiply_transposed<T, kHeadDim, 1, kStep / 16>(ds, SharedOperand<kHeadDim>{shared_v},
                                                      rows_dout);  // dP^T = V dO^T
#pragma unroll
      for (int j = 0; j < kStep / 16; ++j) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t at = statistics(tile) + (step + j * 16 + n * 8 + (lane & 3) * 2) * 4;
          const float2 base = ptx::load_shared_float2(at),
                       delta = ptx::load_shared_float2(at + Shape::kStatistics);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &x = s[j].x[0][n][e], &dx = ds[j].x[0][n][e];
            x = ptx::exp2_approximate(
                fmaf(x, log2_scale, key_bias[e >> 1] - (e & 1 ? base.y : base.x)));
            dx = x * (dx - (e & 1 ? delta.y : delta.x));
            dbias[e >> 1] += dx;
          }
        }
        accumulate<T>(dv, round_to<T>(s[j]), rows_dout + j * 16 * kRow);
        accumulate<T>(dk, round_to<T>(ds[j]), rows_q + j * 16 * kRow);
      }
    }
    if (tile + 1 < end) write_statistics(tile + 1, next);
  }
  ptx::cp_async_wait<0>();

  // Rows past this item's keys get exact zeros, whatever passed by.
  const int row = first + (lane >> 2);
  const bool inside[2] = {row < keys && begin < end, row + 8 < keys && begin < end};
#pragma unroll
  for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dk.x[0][d][e] = inside[e >> 1] ? dk.x[0][d][e] * p.scale : 0.f;
      if (!inside[e >> 1]) dv.x[0][d][e] = 0.f;
    }
  if (p.dk_parts == nullptr) {
    const float one[2] = {1.f, 1.f};
    T* to_k = place.at(static_cast<T*>(p.dk), p.dk_strides.batch, p.dk_strides.head);
    T* to_v = place.at(static_cast<T*>(p.dv), p.dv_strides.batch, p.dv_strides.head);
    store_rows<T, kHeadDim>(to_k, p.dk_strides.row, first, p.keys, shared_k, dk.x[0], one);
    store_rows<T, kHeadDim>(to_v, p.dv_strides.row, first, p.keys, shared_v, dv.x[0], one);
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + r * 8 >= p.keys) continue;
      const int64_t batch = static_cast<int64_t>(split) * p.batch + place.batch;
      const int64_t at =
          ((batch * p.keys + row + r * 8) * p.heads + place.head) * kHeadDim + (lane & 3) * 2;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        *reinterpret_cast<float2*>(p.dk_parts + at + d * 8) =
            float2{dk.x[0][d][2 * r], dk.x[0][d][2 * r + 1]};
        *reinterpret_cast<float2*>(p.dv_parts + at + d * 8) =
            float2{dv.x[0][d][2 * r], dv.x[0][d][2 * r + 1]};
      }
    }
  }
  if (p.dbias_parts != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(dbias[r]);
      const int64_t batch = static_cast<int64_t>(split) * p.batch + place.batch;
      if ((lane & 3) == 0 && row + r * 8 < p.keys)
        p.dbias_parts[(batch * p.heads + place.head) * p.keys + row + r * 8] =
            inside[r] ? sum : 0.f;
    }
  }
}

// dQ, and delta where exact_delta asks for it: rows of scores are this warp's 16 queries, columns
// the keys that pass by, once for dQ and before that once for delta.
// mutants: backward: queries
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_backward_queries(const __grid_constant__ BackwardParams p) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kRow = Shape::kRowBytes, kKeys = Shape::kOther, kStep = Shape::kStep;
  const Place place((p.queries + Shape::kOwn - 1) / Shape::kOwn, p.heads);
  const int lane = lane_id(), warp = warp_id(), first = place.part * Shape::kOwn + warp * 16;
  const int keys = key_count(p.key_lengths, place.batch, p.keys),
            tiles = (keys + kKeys - 1) / kKeys;
  const T* q = place.at(static_cast<const T*>(p.q), p.q_strides.batch, p.q_strides.head);
  const T* k = place.at(static_cast<const T*>(p.k), p.k_strides.batch, p.k_strides.head);
  const T* v = place.at(static_cast<const T*>(p.v), p.v_strides.batch, p.v_strides.head);
  const T* dout =
      place.at(static_cast<const T*>(p.dout), p.dout_strides.batch, p.dout_strides.head);
  const float* bias = p.bias == nullptr ? nullptr : place.at(p.bias, p.bias_batch, p.bias_head);

  const uint32_t shared_q = ptx::shared_base() + warp * 16 * kRow,
                 shared_dout = shared_q + Shape::kOwn * kRow;
  auto stage = [&](int i) {
    return ptx::shared_base() + Shape::kOwnBytes + (i & 1) * Shape::kStage;
  };
  auto load_stage = [&](int tile, int round) {
    const int at = tile * kKeys;
    load_rows<T, kHeadDim>(stage(round), k, p.k_strides.row, at, kKeys, keys, threadIdx.x,
                           kThreads);
    load_rows<T, kHeadDim>(stage(round) + kKeys * kRow, v, p.v_strides.row, at, kKeys, keys,
                           threadIdx.x, kThreads);
  };

  load_rows<T, kHeadDim>(shared_q, q, p.q_strides.row, first, 16, p.queries, lane, 32);
  load_rows<T, kHeadDim>(shared_dout, dout, p.dout_strides.row, first, 16, p.queries, lane, 32);
  if (tiles > 0) load_stage(0, 0);
  ptx::cp_async_commit();

  const float log2_scale = p.scale * kLog2E, inverse_scale = 1.f / p.scale;
  float base[2] = {}, delta[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + (lane >> 2) + r * 8;
    if (row >= p.queries) continue;
    base[r] = probability_base(p.lse[place.batch_head * p.queries + row]);
    if (!p.exact_delta) delta[r] = p.delta[place.batch_head * p.queries + row];
  }
  auto finish_delta = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + (lane >> 2) + r * 8;
      delta[r] = row_sum(delta[r]);
      if ((lane & 3) == 0 && row < p.queries)
        p.delta[place.batch_head * p.queries + row] = delta[r];
    }
  };

  Accumulator<kHeadDim> dq;
  const int rounds = p.exact_delta ? 2 * tiles : tiles;
  for (int round = 0; round < rounds; ++round) {
    const bool for_delta = round < rounds - tiles;
    const int tile = round < tiles ? round : round - tiles;
    if (p.exact_delta && round == tiles) finish_delta();
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile has landed for all, and all are done with the other stage
    if (round + 1 < rounds)
      load_stage(round + 1 < tiles ? round + 1 : round + 1 - tiles, round + 1);
    ptx::cp_async_commit();

#pragma unroll 1
    for (int step = 0; step < kKeys; step += kStep) {
      const uint32_t rows_k = stage(round) + step * kRow, rows_v = rows_k + kKeys * kRow;
      Scores<> s[kStep / 16], ds[kStep / 16];
      multiply_transposed<T, kHeadDim, 1, kStep / 16>(s, SharedOperand<kHeadDim>{shared_q},
                                                      rows_k);  // S = Q K^T
      multiply_transposed<T, kHeadDim, 1, kStep / 16>(ds, SharedOperand<kHeadDim>{shared_dout},
                                                      rows_v);  // dP = dO V^T
#pragma unroll
      for (int j = 0; j < kStep / 16; ++j) {
        const int key = tile * kKeys + step + j * 16;
        if (bias != nullptr || key + 16 > keys) bias_and_mask(s[j], bias, inverse_scale, key, keys);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &x = s[j].x[0][n][e], &dx = ds[j].x[0][n][e];
            x = ptx::exp2_approximate(fmaf(x, log2_scale, -base[e >> 1]));
            if (for_delta)
              delta[e >> 1] = fmaf(x, dx, delta[e >> 1]);
            else
              dx = x * (dx - delta[e >> 1]);
          }
        if (!for_delta) accumulate<T>(dq, round_to<T>(ds[j]), rows_k + j * 16 * kRow);
      }
    }
  }
  if (p.exact_delta && tiles == 0) finish_delta();
  ptx::cp_async_wait<0>();

  const float factor[2] = {p.scale, p.scale};
  T* to = place.at(static_cast<T*>(p.dq), p.dq_strides.batch, p.dq_strides.head);
  store_rows<T, kHeadDim>(to, p.dq_strides.row, first, p.queries, shared_q, dq.x[0], factor);
}

}  // namespace diffusion_fast
