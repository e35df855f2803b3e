// Attention in float32 arithmetic, whatever the numbers' type.
#include "attention.h"

#include <cmath>

#include "attend.h"
#include "product.h"

namespace {

template <class T>
inline float number(const T* from) {
  return load(from, Part{1})[0];
}
template <>
inline float number(const float* from) {
  return *from;
}
template <>
inline float number(const BFloat16* from) {
  return bits_of<float>(uint32_t(from->bits) << 16);
}

// Keys by blocks, in each by panels of columns: [panel][D][width], a width being the vectors that
// the panel's keys take. Values by blocks: [panel][keys][width].
template <class T>
struct Vectors {
  using Number = T;
  using Packed = float;
  static constexpr long kQueries = 8 * kTileRows;
  static constexpr long kKeys = 128;   // whole panels
  static constexpr long kDepth = 256;  // channels of a head whose products are summed at once
  static constexpr double kLog2E = 1.4426950408889634;  // scores are powers of two
  static constexpr float kNone = -std::numeric_limits<float>::infinity();
  static_assert(kKeys % kPanel == 0);

  struct Scratch {
    long sums_row;
    Buffer<float> queries, scores, sums;
    float most[kQueries], total[kQueries];

    explicit Scratch(const Attention& a)
        : sums_row(rounded_up(a.dim, kLanes)),
          queries(kQueries * a.dim),
          scores(kQueries * kKeys),
          sums(kQueries * sums_row) {}
  };

  static long keys_size(const Attention& a, long keys) { return keys * a.dim; }
  static long values_size(const Attention& a, long keys) {
    return keys * rounded_up(a.dim, kLanes);
  }

  static void pack(const Attention& a, const T* k, const T* v, const Block& block, long,
                   Head<float>& head) {
    const long dim = a.dim, padded = rounded_up(dim, kLanes);
    const long first = block.first, count = block.count;
    float* keys = head.keys.data() + block.at * dim;
    for (long panel = 0; panel < count; panel += kPanel) {
      const long width = vectors_of(count - panel) * kLanes;
      for (long j = 0; j < width; ++j) {
        const bool real = panel + j < count;
        const T* from = k + (first + panel + j) * a.k_strides[1];
        for (long d = 0; d < dim; ++d)
          keys[panel * dim + d * width + j] = real ? number(from + d) : 0.f;
      }
    }
    float* values = head.values.data() + block.at * padded;
    for (long panel = 0; panel < dim; panel += kPanel) {
      const long width = vectors_of(dim - panel) * kLanes, real = std::min(dim - panel, width);
      float* to = values + panel * count;
      for (long j = 0; j < count; ++j, to += width) {
        const T* from = v + (first + j) * a.v_strides[1] + panel;
        for (long d = 0; d < real; ++d) to[d] = number(from + d);
        std::fill(to + real, to + width, 0.f);
      }
    }
  }

  static long tiles_of(long rows) { return (rows + kTileRows - 1) / kTileRows; }

  static void clear(Scratch& s) {
    std::fill(s.most, s.most + kQueries, kNone);
    std::fill(s.total, s.total + kQueries, 0.f);
    std::fill(s.sums.begin(), s.sums.end(), 0.f);
  }

  static void begin(const Attention& a, const T* q, long rows, Scratch& s) {
    for (long row = 0; row < tiles_of(rows) * kTileRows; ++row) {  // [tile][D][rows]
      const T* from = q + row * a.q_strides[1];
      float* to = s.queries.data() + row / kTileRows * kTileRows * a.dim + row % kTileRows;
      for (long d = 0; d < a.dim; ++d)
        to[d * kTileRows] = row < rows ? number(from + d) * float(a.scale * kLog2E) : 0.f;
    }
  }

  static void scores(const Attention& a, const Head<float>& head, long rows, const Block& block,
                     Scratch& s) {
    const long count = block.count;
    const float* keys = head.keys.data() + block.at * a.dim;
    for (long panel = 0; panel < count; panel += kPanel) {
      const int vectors = vectors_of(count - panel);
      for (long t = 0; t < tiles_of(rows); ++t)
        for (long d = 0; d < a.dim; d += kDepth)
          tile_of(kTileRows, vectors, s.queries.data() + (t * a.dim + d) * kTileRows, 1, kTileRows,
                  keys + panel * a.dim + d * vectors * kLanes, vectors * kLanes,
                  std::min(kDepth, a.dim - d), s.scores.data() + t * kTileRows * kKeys + panel,
                  kKeys, d > 0);
    }
  }

  static void weigh(const Attention& a, const float* bias, long rows, long seen, Scratch& s) {
    for (long row = 0; row < rows; ++row)
      weigh_row(a, bias ? bias + row * a.bias_strides[2] : nullptr, row, seen, s);
  }

  static void weigh_row(const Attention& a, const float* bias, long row, long count, Scratch& s) {
    float* scores = s.scores.data() + row * kKeys;
    if (bias)
      for (long j = 0; j < count; ++j) scores[j] += bias[j * a.bias_strides[3]] * float(kLog2E);
    const long end = rounded_up(count, kLanes);
    for (long j = count; j < end; ++j) scores[j] = kNone;
    Vec highest = all(kNone);
    for (long j = 0; j < end; j += kLanes) {
      const Vec score = load(scores + j, Full{});
      highest = score > highest ? score : highest;
    }
    float most = s.most[row];
    for (int i = 0; i < kLanes; ++i) most = std::max(most, highest[i]);
    const float from = most == kNone ? 0 : most;
    Vec total = {};
    for (long j = 0; j < end; j += kLanes) {
      const Vec weight = power_of_two(load(scores + j, Full{}) - from);
      total += weight;
      store(scores + j, weight, Full{});
    }
    if (most != s.most[row]) {
      const float factor = std::exp2(s.most[row] - most);
      float* sums = s.sums.data() + row * s.sums_row;
      s.total[row] *= factor;
      for (long d = 0; d < s.sums_row; d += kLanes)
        store(sums + d, load(sums + d, Full{}) * factor, Full{});
      s.most[row] = most;
    }
    s.total[row] += sum(total);
  }

  static void add_up(const Attention& a, const Head<float>& head, long rows, const Block& block,
                     long seen, Scratch& s) {
    const float* values = head.values.data() + block.at * s.sums_row;
    for (long panel = 0; panel < a.dim; panel += kPanel) {
      const int vectors = vectors_of(a.dim - panel);
      for (long t = 0; t < tiles_of(rows); ++t)
        tile_of(kTileRows, vectors, s.scores.data() + t * kTileRows * kKeys, kKeys, 1,
                values + panel * block.count, vectors * kLanes, seen,
                s.sums.data() + t * kTileRows * s.sums_row + panel, s.sums_row, true);
    }
  }

  static void end(const Attention& a, long rows, const float* weights, T* out, const Scratch& s) {
    for (long row = 0; row < rows; ++row, out += a.heads * a.dim) {
      float factor = s.total[row] == 0 ? 0 : 1 / s.total[row];
      if (weights) factor *= weights[row * a.weights_strides[2]];
      const float* sums = s.sums.data() + row * s.sums_row;
      long d = 0;
      for (; d + kLanes <= a.dim; d += kLanes)
        write(out + d, load(sums + d, Full{}) * factor, weights, Full{});
      if (d < a.dim) write(out + d, load(sums + d, Full{}) * factor, weights, Part{int(a.dim - d)});
    }
  }

  template <class Width>
  static void write(T* to, Vec value, bool onto, Width width) {
    store(to, onto ? load(to, width) + value : value, width);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void attention(const Attention* a) {
  if (a->dtype == 0) run<Vectors<float>>(*a);
  if (a->dtype == 1 && !attention_in_tiles(*a)) run<Vectors<BFloat16>>(*a);
  if (a->dtype == 2) run<Vectors<Float16>>(*a);
}
