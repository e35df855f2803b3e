// Products of float32 matrices: of tiles, whose sums stay in registers, and of large ones by them.
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
constexpr long kPanel = kTileVectors * kLanes;     // columns
constexpr long kDepth = kLanes == 16 ? 128 : 320;  // summed at once in a large product, at most
constexpr long kLine = 16;                         // numbers of a line of the cache

// c[r][n] (+)= sum over k < depth of a[r * a_row + k * a_step] b[k * b_row + n].
template <int kRows, int kVectors>
inline void tile(const float* a, long a_row, long a_step, const float* b, long b_row, long depth,
                 float* c, long c_row, bool onto) {
  Vec sums[kRows][kVectors] = {};
  for (long k = 0; k < depth; ++k) {
    Vec column[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) column[n] = load(b + k * b_row + n * kLanes, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec one = all(a[r * a_row + k * a_step]);
      for (int n = 0; n < kVectors; ++n) sums[r][n] += one * column[n];
    }
  }
  if (onto)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < kVectors; ++n) sums[r][n] += load(c + r * c_row + n * kLanes, Full{});
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kVectors; ++n) store(c + r * c_row + n * kLanes, sums[r][n], Full{});
}

// The same for as many rows and vectors of columns as there are, up to a tile's; in any numbers
// that have a tile.
template <int kRows = kTileRows, class T>
inline void tile_of(long rows, int vectors, const T* a, long a_row, long a_step, const T* b,
                    long b_row, long depth, float* c, long c_row, bool onto) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return tile_of<kRows - 1>(rows, vectors, a, a_row, a_step, b, b_row, depth, c, c_row, onto);
  switch (vectors) {
    case 1: return tile<kRows, 1>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
    case 2: return tile<kRows, 2>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
#if defined(__AVX512F__)
    case 3: return tile<kRows, 3>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
    case 4: return tile<kRows, 4>(a, a_row, a_step, b, b_row, depth, c, c_row, onto);
#endif
  }
}

// Vectors of a panel that begins there.
inline int vectors_of(long columns) {
  return int((std::min(columns, kPanel) + kLanes - 1) / kLanes);
}

// The weight of a large product: panels of columns [panel][depth][width], a width being the vectors
// that the panel's columns take.
struct Weight {
  const float* at;
  long depth, columns;  // whole lines
};

// How much of a depth is summed at once: equal parts of it.
inline long depth_of(long whole) {
  const long parts = (whole + kDepth - 1) / kDepth;
  return (whole + parts - 1) / parts;
}

// Rows of numbers: element k of row r is at[r * row + k * step].
struct Values {
  const float* at;
  long row, step = 1;
};

// sums[row][0 to end - begin] (+)= values[row][depth] weight[d to d + depth][begin to end]. A block
// of the weight stays in the first cache for all rows, and while it is used the next one is
// fetched.
inline void multiply(const Values& values, const Weight& weight, long d, long depth, float* sums,
                     long sums_row, long rows, long begin, long end, bool onto) {
  for (long panel = begin; panel < end; panel += kPanel) {
    const int vectors = vectors_of(weight.columns - panel);
    const long width = vectors * kLanes;
    const float* block = weight.at + panel * weight.depth + d * width;
    const float* next = panel + kPanel < end
                            ? block + kPanel * weight.depth
                            : weight.at + begin * weight.depth +
                                  (d + depth) * std::min(kPanel, weight.columns - begin);
    const long share = rounded_up((depth * width * kTileRows + rows - 1) / rows, kLine);
    for (long row = 0; row < rows; row += kTileRows) {
      for (long i = 0; i < share; i += kLine)
        __builtin_prefetch(next + row / kTileRows * share + i, 0, 2);
      tile_of(rows - row, vectors, values.at + row * values.row, values.row, values.step, block,
              width, depth, sums + row * sums_row + panel - begin, sums_row, onto);
    }
  }
}

}  // namespace
