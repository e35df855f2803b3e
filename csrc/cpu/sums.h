// What attention has summed up for a block of queries. Matrices are transposed, so that a vector
// holds queries and a softmax is vertical.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "buffer.h"
#include "vector.h"

namespace {

template <long kQueries>
struct Sums {
  static constexpr double kLog2E = 1.4426950408889634;  // scores are powers of two
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  long row;                                           // of a query's channels
  Buffer<float> sums;                                 // [D in whole vectors][queries]
  Buffer<float> rows;                                 // [queries][row]: as they come or go
  bool empty;                                         // whether nothing is summed yet
  alignas(64) float most[kQueries], total[kQueries];  // the largest score, the sum of weights

  explicit Sums(const Attention& a)
      : row(rounded_up(a.dim, kLanes)), sums(row * kQueries), rows(kQueries * row) {}

  void clear() {
    std::fill(most, most + kQueries, kNone);
    std::fill(total, total + kQueries, 0.f);
    empty = true;
  }

  // Scales the sums of the vector of queries at `at`, of which `highest` are the largest of more
  // scores. Returns what weights are to be measured from: 0 for a query that has seen no key yet,
  // so that they are 0.
  Vec raise(long at, Vec highest) {
    const Vec before = load(most + at, Full{}), now = larger(highest, before);
    const Vec from = now == kNone ? Vec{} : now;
    if (!empty && !same(before, now)) {
      const Vec factor = power_of_two(before - from);
      store(total + at, load(total + at, Full{}) * factor, Full{});
      for (float* sum = &sums[at]; sum < sums.data() + sums.size(); sum += kQueries)
        store(sum, load(sum, Full{}) * factor, Full{});
    }
    store(most + at, now, Full{});
    return from;
  }

  // Writes them by the sums of their weights; or with the weights of a part adds them, weighted.
  template <class T>
  void write(const Attention& a, long count, const float* weights, T* out, float* lse) {
    const long dim = a.dim;
    if (lse)
      for (long r = 0; r < count; ++r) lse[r] = float((most[r] + std::log2(total[r])) / kLog2E);
    if (empty) std::fill(sums.begin(), sums.end(), 0.f);
    transpose(sums.data(), kQueries, dim, count, rows.data(), row);
    for (long r = 0; r < count; ++r, out += a.heads * dim) {
      float factor = total[r] == 0 ? 0 : 1 / total[r];
      if (weights) factor *= weights[r * a.weights_strides[2]];
      const float* values = &rows[r * row];
      long d = 0;
      for (; d + kLanes <= dim; d += kLanes)
        write(out + d, load(values + d, Full{}) * factor, weights, Full{});
      if (d < dim) write(out + d, load(values + d, Full{}) * factor, weights, Part{int(dim - d)});
    }
  }

 private:
  template <class T, class Width>
  static void write(T* to, Vec value, bool onto, Width width) {
    store(to, onto ? load(to, width) + value : value, width);
  }
};

}  // namespace
