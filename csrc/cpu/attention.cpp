// Attention in float32 arithmetic, whatever the numbers' type.
#include "attention.h"

#include "attend.h"
#include "product.h"
#include "sums.h"

namespace {

// Scores are K Q^T and sums V^T P^T. Keys are packed as rows [keys][D], values by groups of
// channels, [group][keys][width].
template <class T>
struct Vectors {
  using Number = T;
  using Packed = float;
  static constexpr long kQueries = kPanel;
  static constexpr long kKeys = kLanes == 16 ? 80 : 128;  // the first cache holds their scores
  static constexpr long kGroup = 8 * kTileRows;           // and values of so many channels
  static constexpr double kLog2E = Sums<kQueries>::kLog2E;

  struct Scratch : Sums<kQueries> {
    Buffer<float> queries, scores;  // [D][queries], [keys][queries]

    explicit Scratch(const Attention& a)
        : Sums<kQueries>(a), queries(a.dim * kQueries), scores(kKeys * kQueries) {}
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

  static void copy(const T* from, long count, float* to, float factor = 1) {
    long d = 0;
    for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d, Full{}) * factor, Full{});
    const Part rest{int(count - d)};
    if (d < count) store(to + d, load(from + d, rest) * factor, rest);
  }

  static void begin(const Attention& a, const T* q, long rows, Scratch& s) {
    for (long row = 0; row < rows; ++row)
      copy(q + row * a.q_strides[1], a.dim, &s.rows[row * s.row], float(a.scale * kLog2E));
    transpose(s.rows.data(), s.row, rows, a.dim, s.queries.data(), kQueries);
    for (long d = 0; d < a.dim; ++d)
      std::fill(&s.queries[d * kQueries + rows], &s.queries[d * kQueries] + kQueries, 0.f);
  }

  static void clear(Scratch& s) { s.clear(); }

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
    for (long at = 0; at < vectors_of(rows) * kLanes; at += kLanes) weigh_vector(at, seen, s);
  }

  static void weigh_vector(long at, long seen, Scratch& s) {
    float* scores = s.scores.data() + at;
    auto score = [&](long j) { return load(scores + j * kQueries, Full{}); };
    Vec highest[4] = {score(0), score(0), score(0), score(0)};
    long j = 0;
    for (; j + 4 <= seen; j += 4)
      for (int i = 0; i < 4; ++i) highest[i] = larger(score(j + i), highest[i]);
    for (; j < seen; ++j) highest[0] = larger(score(j), highest[0]);
    const Vec from =
        s.raise(at, larger(larger(highest[0], highest[1]), larger(highest[2], highest[3])));
    Vec totals[4] = {};
    auto weigh = [&](long j, Vec& total) {
      const Vec weight = power_of_two(score(j) - from);
      total += weight;
      store(scores + j * kQueries, weight, Full{});
    };
    for (j = 0; j + 4 <= seen; j += 4)
      for (int i = 0; i < 4; ++i) weigh(j + i, totals[i]);
    for (; j < seen; ++j) weigh(j, totals[0]);
    const Vec total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    store(s.total + at, load(s.total + at, Full{}) + total, Full{});
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

  static void end(const Attention& a, long rows, const float* weights, T* out, float* lse,
                  Scratch& s) {
    s.write(a, rows, weights, out, lse);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) int attention(const Attention* a) {
  return out_of_memory([&] {
    if (a->dtype == 0) run<Vectors<float>>(*a);
    if (a->dtype == 1 && !attention_in_tiles(*a) && !attention_in_pairs(*a))
      run<Vectors<BFloat16>>(*a);
    if (a->dtype == 2) run<Vectors<Float16>>(*a);
  });
}
