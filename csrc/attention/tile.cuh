// Building blocks of one warp: rows of a matrix in shared memory, products of 16-row tiles,
// reductions over a row.
//
// A 16-row tile of float accumulators follows mma.m16n8: with g = lane / 4 and t = lane % 4,
// element e of column block n is row g + 8 (e / 2), column 8 n + 2 t + e % 2. The four lanes of one
// g are a quad and hold whole rows.
#pragma once
#include <cmath>
#include <cstdint>

#include "../device.cuh"

namespace diffusion_fast {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

// Rows in shared memory. An odd number of 16-byte chunks per row keeps ldmatrix free of bank
// conflicts: the eight rows of a block then start in eight different groups of four banks.
// mutants: rows
template <int kHeadDim>
struct Rows {
  static_assert(kHeadDim % 8 == 0, "rows are whole 16-byte chunks");
  static constexpr int kChunks = kHeadDim / 8, kStride = (kChunks | 1) * 16;  // kStride in bytes
};

// Starts copying rows [first, first + rows) of `from` to shared memory, `workers` threads sharing
// the work; rows from `limit` on become zeros, unread.
// mutants: load
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_rows(uint32_t to, const T* from, int64_t stride, int first,
                                          int rows, int limit, int worker, int workers) {
  using R = Rows<kHeadDim>;
#pragma unroll 1
  for (int i = worker; i < rows * R::kChunks; i += workers) {
    const int row = i / R::kChunks, chunk = i % R::kChunks;
    const bool valid = first + row < limit;
    const T* source = from + (valid ? first + row : 0) * stride + chunk * 8;
    ptx::cp_async16(to + row * R::kStride + chunk * 16, source, valid);
  }
}

// kM * 16 rows by 16 columns of scores.
template <int kM = 1>
struct Scores {
  float x[kM][2][4] = {};
};

// The left operand of a product, kM * 16 rows: read from shared memory each time, or held in
// registers.
// mutants: left operand
template <int kHeadDim, int kM = 1>
struct SharedOperand {
  uint32_t rows;
  __device__ __forceinline__ void get(int m, int step, uint32_t (&a)[4]) const {
    using R = Rows<kHeadDim>;
    const int block = lane_id() >> 3, row = (block & 1) * 8 + (lane_id() & 7);
    ptx::ldmatrix_x4(a, rows + (m * 16 + row) * R::kStride + (step * 2 + (block >> 1)) * 16);
  }
  __device__ __forceinline__ void get_tail(int m, uint32_t (&a)[2]) const {
    using R = Rows<kHeadDim>;
    ptx::ldmatrix_x2(a, rows + (m * 16 + (lane_id() & 15)) * R::kStride + (R::kChunks - 1) * 16);
  }
};
template <int kHeadDim, int kM = 1>
struct RegisterOperand {
  uint32_t full[kM][kHeadDim / 16][4], tail[kM][2];
  __device__ __forceinline__ explicit RegisterOperand(SharedOperand<kHeadDim, kM> shared) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) shared.get(m, step, full[m][step]);
      if constexpr (kHeadDim % 16) shared.get_tail(m, tail[m]);
    }
  }
  __device__ __forceinline__ void get(int m, int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = full[m][step][i];
  }
  __device__ __forceinline__ void get_tail(int m, uint32_t (&a)[2]) const {
    a[0] = tail[m][0];
    a[1] = tail[m][1];
  }
};

// s[j] += A B_j^T over the head dim, B_j being 16 rows from `rows` + j * 16 on. A head dim that is
// no multiple of 16 ends in an m16n8k8, so that nothing is padded.
// mutants: right operand
template <typename T, int kHeadDim, int kM, int kColumns, class Operand>
__device__ __forceinline__ void multiply_transposed(Scores<kM>* s, const Operand& operand,
                                                    uint32_t rows) {
  using R = Rows<kHeadDim>;
  const int lane = lane_id(), block = lane >> 3;
  const uint32_t full = rows + ((block >> 1) * 8 + (lane & 7)) * R::kStride + (block & 1) * 16;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) operand.get(m, step, a[m]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, full + j * 16 * R::kStride + step * 32);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(s[j].x[m][0], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(s[j].x[m][1], a[m], b[2], b[3]);
      }
    }
  }
  if constexpr (kHeadDim % 16) {
    uint32_t a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) operand.get_tail(m, a[m]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      uint32_t b[2];
      ptx::ldmatrix_x2(b, rows + (j * 16 + (lane & 15)) * R::kStride + (R::kChunks - 1) * 16);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k8<T>(s[j].x[m][0], a[m], b[0]);
        ptx::mma_m16n8k8<T>(s[j].x[m][1], a[m], b[1]);
      }
    }
  }
}

// kM * 16 rows of the head dim.
template <int kHeadDim, int kM = 1>
struct Accumulator {
  float x[kM][kHeadDim / 8][4] = {};
};

// Scores rounded to T, as a left operand: the layouts of accumulator and operand agree, so nothing
// moves between lanes.
template <int kM = 1>
struct Rounded {
  uint32_t x[kM][4];
};
// mutants: rounding
template <typename T, int kM>
__device__ __forceinline__ Rounded<kM> round_to(const Scores<kM>& s) {
  Rounded<kM> r;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r.x[m][i] = ptx::pack<T>(s.x[m][i >> 1][(i & 1) * 2], s.x[m][i >> 1][(i & 1) * 2 + 1]);
  return r;
}

// acc += P B, B being the 16 rows from `rows` on.
// mutants: accumulate
template <typename T, int kHeadDim, int kM>
__device__ __forceinline__ void accumulate(Accumulator<kHeadDim, kM>& acc, const Rounded<kM>& p,
                                           uint32_t rows) {
  using R = Rows<kHeadDim>;
  const int lane = lane_id(), block = lane >> 3;
  const uint32_t full = rows + ((block & 1) * 8 + (lane & 7)) * R::kStride + (block >> 1) * 16;
#pragma unroll
  for (int d = 0; d < R::kChunks / 2; ++d) {
    uint32_t b[4];
    ptx::ldmatrix_x4_transposed(b, full + d * 32);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::mma_m16n8k16<T>(acc.x[m][2 * d], p.x[m], b[0], b[1]);
      ptx::mma_m16n8k16<T>(acc.x[m][2 * d + 1], p.x[m], b[2], b[3]);
    }
  }
  if constexpr (R::kChunks % 2) {
    uint32_t b[2];
    ptx::ldmatrix_x2_transposed(b, rows + (lane & 15) * R::kStride + (R::kChunks - 1) * 16);
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::mma_m16n8k16<T>(acc.x[m][R::kChunks - 1], p.x[m], b[0], b[1]);
  }
}

// Over the quad, so over a row.
// mutants: reductions
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Writes the 16 rows acc.x[m], times factor[0] (rows g) and factor[1] (rows g + 8), as rows
// first... of `to`, below `limit`. They pass through 16 rows of shared memory that this warp alone
// uses, so that the stores are 16 bytes each.
// mutants: store
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int first, int limit,
                                           uint32_t stage, const float (&x)[kHeadDim / 8][4],
                                           const float (&factor)[2]) {
  using R = Rows<kHeadDim>;
  const int lane = lane_id();
  const uint32_t mine = stage + (lane >> 2) * R::kStride + (lane & 3) * 4;
  __syncwarp();  // other lanes have read these rows
#pragma unroll
  for (int d = 0; d < R::kChunks; ++d) {
    ptx::store_shared32(mine + d * 16, ptx::pack<T>(x[d][0] * factor[0], x[d][1] * factor[0]));
    ptx::store_shared32(mine + 8 * R::kStride + d * 16,
                        ptx::pack<T>(x[d][2] * factor[1], x[d][3] * factor[1]));
  }
  __syncwarp();
  for (int i = lane; i < 16 * R::kChunks; i += 32) {
    const int row = i / R::kChunks, chunk = i % R::kChunks;
    if (first + row >= limit) break;
    const uint4 v = ptx::load_shared128(stage + row * R::kStride + chunk * 16);
    *reinterpret_cast<uint4*>(to + (first + row) * stride + chunk * 8) = v;
  }
}

// The block's place: blocks of one head lie next to each other, so that its K and V stay in the L2
// cache.
// mutants: place
struct Place {
  int part, batch, head;
  int64_t batch_head;
  __device__ __forceinline__ Place(int parts, int heads)
      : part(blockIdx.x % parts),
        batch(blockIdx.x / parts / heads),
        head(blockIdx.x / parts % heads),
        batch_head(blockIdx.x / parts) {}
  template <typename T>
  __device__ __forceinline__ T* at(T* base, const int64_t batch_stride,
                                   const int64_t head_stride) const {
    return base + batch * batch_stride + head * head_stride;
  }
};

__device__ __forceinline__ int key_count(const int* key_lengths, int batch, int keys) {
  if (key_lengths == nullptr) return keys;
  const int length = key_lengths[batch];
  return length < 0 ? 0 : length < keys ? length : keys;
}

}  // namespace diffusion_fast
