// Attention in float32 arithmetic, whatever the numbers' type.
#include "attention.h"

#include "attend.h"
#include "product.h"

namespace {

// to[c][r] = factor from[r][c].
inline void transpose(const float* from, long from_row, long rows, long columns, float factor,
                      float* to, long to_row) {
  long r = 0;
  for (; r + 4 <= rows; r += 4) {
    long c = 0;
    for (; c + 4 <= columns; c += 4) {
      __m128 block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        block[i] = _mm_loadu_ps(from + (r + i) * from_row + c) * _mm_set1_ps(factor);
      _MM_TRANSPOSE4_PS(block[0], block[1], block[2], block[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (c + i) * to_row + r, block[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < 4; ++i) to[c * to_row + r + i] = from[(r + i) * from_row + c] * factor;
  }
  for (; r < rows; ++r)
    for (long c = 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c] * factor;
}

// All matrices are transposed: scores are K Q^T and sums V^T P^T, so that a vector holds queries
// and a softmax is vertical. Keys are packed as rows [keys][D], values by groups of channels,
// [group][keys][width].
template <class T>
struct Vectors {
  using Number = T;
  using Packed = float;
  static constexpr long kQueries = kPanel;
  static constexpr long kKeys = kLanes == 16 ? 80 : 128;  // the first cache holds their scores
  static constexpr long kGroup = 8 * kTileRows;           // and values of so many channels
  static constexpr double kLog2E = 1.4426950408889634;    // scores are powers of two
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  struct Scratch {
    long row;                             // of a query's channels
    Buffer<float> queries, scores, sums;  // [D][queries], [keys][queries], [D][queries]
    Buffer<float> rows;                   // [queries][row]
    bool empty;                           // whether nothing is summed yet
    alignas(64) float most[kQueries], total[kQueries];

    explicit Scratch(const Attention& a)
        : row(rounded_up(a.dim, kLanes)),
          queries(a.dim * kQueries),
          scores(kKeys * kQueries),
          sums(a.dim * kQueries),
          rows(kQueries * row) {}
  };

  static long keys_size(const Attention& a, long keys) { return keys * a.dim; }
  static long values_size(const Attention& a, long keys) { return keys * a.dim; }

  static void pack(const Attention& a, const T* k, const T* v, const Block& block, long seen,
                   Head<float>& head) {
    float* keys = head.keys.data() + block.at * a.dim;
    float* values = head.values.data() + block.at * a.dim;
    for (long j = 0; j < seen; ++j) {
      copy(k + (block.first + j) * a.k_strides[1], a.dim, keys + j * a.dim);
      const T* from = v + (block.first + j) * a.v_strides[1];
      for (long d = 0; d < a.dim; d += kGroup) {
        const long width = std::min(kGroup, a.dim - d);
        copy(from + d, width, values + d * block.count + j * width);
      }
    }
  }

  static void copy(const T* from, long count, float* to) {
    long d = 0;
    for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d, Full{}), Full{});
    const Part rest{int(count - d)};
    if (d < count) store(to + d, load(from + d, rest), rest);
  }

  static void begin(const Attention& a, const T* q, long rows, Scratch& s) {
    for (long row = 0; row < rows; ++row)
      copy(q + row * a.q_strides[1], a.dim, &s.rows[row * s.row]);
    transpose(s.rows.data(), s.row, rows, a.dim, float(a.scale * kLog2E), s.queries.data(),
              kQueries);
    for (long d = 0; d < a.dim; ++d)
      std::fill(&s.queries[d * kQueries + rows], &s.queries[d * kQueries] + kQueries, 0.f);
  }

  static void clear(Scratch& s) {
    std::fill(s.most, s.most + kQueries, kNone);
    std::fill(s.total, s.total + kQueries, 0.f);
    s.empty = true;
  }

  static void scores(const Attention& a, const Head<float>& head, long rows, const Block& block,
                     long seen, Scratch& s) {
    const float* keys = head.keys.data() + block.at * a.dim;
    const long depth = depth_of(a.dim);
    for (long d = 0; d < a.dim; d += depth)
      for (long j = 0; j < seen; j += kTileRows)
        tile_of(seen - j, vectors_of(rows), keys + j * a.dim + d, a.dim, 1,
                s.queries.data() + d * kQueries, kQueries, std::min(depth, a.dim - d),
                s.scores.data() + j * kQueries, kQueries, d > 0);
  }

  static void weigh(const Attention& a, const float* bias, long rows, long seen, Scratch& s) {
    if (bias)
      for (long j = 0; j < seen; ++j)
        for (long row = 0; row < rows; ++row)
          s.scores[j * kQueries + row] +=
              bias[row * a.bias_strides[2] + j * a.bias_strides[3]] * float(kLog2E);
    for (long at = 0; at < vectors_of(rows) * kLanes; at += kLanes) weigh_vector(a, at, seen, s);
  }

  static void weigh_vector(const Attention& a, long at, long seen, Scratch& s) {
    float* scores = s.scores.data() + at;
    auto score = [&](long j) { return load(scores + j * kQueries, Full{}); };
    const Vec before = load(s.most + at, Full{});
    Vec highest[4] = {before, before, before, before};
    long j = 0;
    for (; j + 4 <= seen; j += 4)
      for (int i = 0; i < 4; ++i) highest[i] = larger(score(j + i), highest[i]);
    for (; j < seen; ++j) highest[0] = larger(score(j), highest[0]);
    const Vec most = larger(larger(highest[0], highest[1]), larger(highest[2], highest[3]));
    // A query that has seen no key yet: its weights are 0.
    const Vec from = most == kNone ? Vec{} : most;
    Vec totals[4] = {};
    auto weigh = [&](long j, Vec& total) {
      const Vec weight = power_of_two(score(j) - from);
      total += weight;
      store(scores + j * kQueries, weight, Full{});
    };
    for (j = 0; j + 4 <= seen; j += 4)
      for (int i = 0; i < 4; ++i) weigh(j + i, totals[i]);
    for (; j < seen; ++j) weigh(j, totals[0]);
    Vec total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    if (!s.empty) {
      const Vec factor = power_of_two(before - from);
      total += load(s.total + at, Full{}) * factor;
      for (float* sums = &s.sums[at]; sums < s.sums.data() + s.sums.size(); sums += kQueries)
        store(sums, load(sums, Full{}) * factor, Full{});
    }
    store(s.total + at, total, Full{});
    store(s.most + at, most, Full{});
  }

  static void add_up(const Attention& a, const Head<float>& head, long rows, const Block& block,
                     long seen, Scratch& s) {
    const float* values = head.values.data() + block.at * a.dim;
    for (long d = 0; d < a.dim; d += kTileRows) {
      const long group = d / kGroup * kGroup, width = std::min(kGroup, a.dim - group);
      tile_of(a.dim - d, vectors_of(rows), values + group * block.count + d % kGroup, 1, width,
              s.scores.data(), kQueries, seen, s.sums.data() + d * kQueries, kQueries, !s.empty);
    }
    s.empty = false;
  }

  static void end(const Attention& a, long rows, const float* weights, T* out, Scratch& s) {
    if (s.empty) std::fill(s.sums.begin(), s.sums.end(), 0.f);
    transpose(s.sums.data(), kQueries, a.dim, rows, 1, s.rows.data(), s.row);
    for (long row = 0; row < rows; ++row, out += a.heads * a.dim) {
      float factor = s.total[row] == 0 ? 0 : 1 / s.total[row];
      if (weights) factor *= weights[row * a.weights_strides[2]];
      const float* sums = &s.rows[row * s.row];
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
