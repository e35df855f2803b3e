// A product of small float32 matrices whose sums stay in registers.
#pragma once

#include <algorithm>

#include "vector.h"

namespace {

// Rows and vectors of columns that are summed at once: as many as there are registers for.
#ifdef __AVX512F__
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr long kPanel = kTileVectors * kLanes;  // columns

// c[r][n] (+)= sum over k < depth of a[r * a_row + k * a_step] b[k * b_row + n].
template <int kVectors>
inline void tile(const float* a, long a_row, long a_step, const float* b, long b_row, long depth,
                 float* c, long c_row, bool onto) {
  Vec sums[kTileRows][kVectors] = {};
  for (long k = 0; k < depth; ++k) {
    Vec column[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) column[n] = load(b + k * b_row + n * kLanes, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vec one = all(a[r * a_row + k * a_step]);
      for (int n = 0; n < kVectors; ++n) sums[r][n] += one * column[n];
    }
  }
  if (onto)
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
      for (int n = 0; n < kVectors; ++n) sums[r][n] += load(c + r * c_row + n * kLanes, Full{});
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < kVectors; ++n) store(c + r * c_row + n * kLanes, sums[r][n], Full{});
}

// The same for as many vectors of columns as there are, up to a panel.
inline void tile_of(int vectors, const float* a, long a_row, long a_step, const float* b,
                    long b_row, long depth, float* c, long c_row, bool onto) {
  switch (vectors) {
    case 1: return tile<1>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
    case 2: return tile<2>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
#if defined(__AVX512F__)
    case 3: return tile<3>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
    case 4: return tile<4>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
#endif
  }
}

// Vectors of a panel that begins there.
inline int vectors_of(long columns) {
  return int((std::min(columns, kPanel) + kLanes - 1) / kLanes);
}

}  // namespace
