// softmax(scale Q K^T + bias) V by blocks of keys, with a running maximum (Milakov & Gimelshein
// 2018; Dao et al. 2022): the scores of a block of queries and keys stay in the cache.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "product.h"

namespace {

constexpr long kQueries = 8 * kTileRows;  // of a block
constexpr long kKeys = 128;               // of a block: whole panels
constexpr long kDepth = 256;              // channels of a head whose products are summed at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

static_assert(kKeys % kPanel == 0);

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

// Keys and values of a head. Keys by blocks, in each by panels of columns: [panel][D][width], a
// width being the vectors that the panel's keys take. Values by blocks: [panel][keys][width].
struct Head {
  std::vector<float> keys, values;
};

inline int vectors_of(long columns) {
  return int((std::min(columns, kPanel) + kLanes - 1) / kLanes);
}

template <class T>
void pack(const Attention& a, const T* k, const T* v, long first, long count, Head& head) {
  const long dim = a.dim, padded = rounded_up(dim, kLanes);
  float* keys = head.keys.data() + first * dim;
  for (long panel = 0; panel < count; panel += kPanel) {
    const long width = vectors_of(count - panel) * kLanes;
    for (long j = 0; j < width; ++j) {
      const bool real = panel + j < count;
      const T* from = k + (first + panel + j) * a.k_strides[1];
      for (long d = 0; d < dim; ++d)
        keys[panel * dim + d * width + j] = real ? number(from + d) : 0.f;
    }
  }
  float* values = head.values.data() + first * padded;
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

// What a thread works with.
struct Scratch {
  std::vector<float> queries, scores, sums;
  float most[kQueries], total[kQueries];

  explicit Scratch(const Attention& a)
      : queries(kQueries * a.dim),
        scores(kQueries * kKeys),
        sums(kQueries * rounded_up(a.dim, kLanes)) {}
};

// Scores of a row to weights exp(score - maximum); what was summed before is scaled to match.
inline void weigh(Scratch& s, long row, long count, const float* bias, long bias_step, float* sums,
                  long padded) {
  float* scores = s.scores.data() + row * kKeys;
  if (bias)
    for (long j = 0; j < count; ++j) scores[j] += bias[j * bias_step];
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
    const Vec weight = exponential(load(scores + j, Full{}) - from);
    total += weight;
    store(scores + j, weight, Full{});
  }
  if (most != s.most[row]) {
    const float factor = std::exp(s.most[row] - most);
    s.total[row] *= factor;
    for (long d = 0; d < padded; d += kLanes)
      store(sums + d, load(sums + d, Full{}) * factor, Full{});
    s.most[row] = most;
  }
  s.total[row] += sum(total);
}

template <class T>
void attend(const Attention& a, long item, long index, long begin, const Head& head, Scratch& s) {
  const long dim = a.dim, padded = rounded_up(dim, kLanes);
  const long rows = std::min(kQueries, a.queries - begin);
  const long tiles = (rows + kTileRows - 1) / kTileRows;
  const T* q = (const T*)a.q + item * a.q_strides[0] + index * a.q_strides[2];
  for (long row = 0; row < tiles * kTileRows; ++row) {  // [tile][D][rows]
    const T* from = q + (begin + row) * a.q_strides[1];
    float* to = s.queries.data() + row / kTileRows * kTileRows * dim + row % kTileRows;
    for (long d = 0; d < dim; ++d)
      to[d * kTileRows] = row < rows ? number(from + d) * float(a.scale) : 0.f;
  }
  std::fill(s.most, s.most + kQueries, kNone);
  std::fill(s.total, s.total + kQueries, 0.f);
  std::fill(s.sums.begin(), s.sums.end(), 0.f);
  const long length = a.lengths ? std::min<long>(a.lengths[item], a.keys) : a.keys;
  for (long first = 0; first < length; first += kKeys) {
    const long packed = std::min(kKeys, a.keys - first), seen = std::min(packed, length - first);
    const float* keys = head.keys.data() + first * dim;
    for (long panel = 0; panel < packed; panel += kPanel) {
      const int vectors = vectors_of(packed - panel);
      for (long t = 0; t < tiles; ++t)
        for (long d = 0; d < dim; d += kDepth)
          tile_of(vectors, s.queries.data() + (t * dim + d) * kTileRows, 1, kTileRows,
                  keys + panel * dim + d * vectors * kLanes, vectors * kLanes,
                  std::min(kDepth, dim - d), s.scores.data() + t * kTileRows * kKeys + panel, kKeys,
                  d > 0);
    }
    const float* bias = nullptr;
    for (long row = 0; row < rows; ++row) {
      if (a.bias)
        bias = a.bias + item * a.bias_strides[0] + index * a.bias_strides[1] +
               (begin + row) * a.bias_strides[2] + first * a.bias_strides[3];
      weigh(s, row, seen, bias, a.bias_strides[3], s.sums.data() + row * padded, padded);
    }
    const float* values = head.values.data() + first * padded;
    for (long panel = 0; panel < dim; panel += kPanel) {
      const int vectors = vectors_of(dim - panel);
      for (long t = 0; t < tiles; ++t)
        tile_of(vectors, s.scores.data() + t * kTileRows * kKeys, kKeys, 1, values + panel * packed,
                vectors * kLanes, seen, s.sums.data() + t * kTileRows * padded + panel, padded,
                true);
    }
  }
  T* out = (T*)a.out + ((item * a.queries + begin) * a.heads + index) * dim;
  for (long row = 0; row < rows; ++row, out += a.heads * dim) {
    const float inverse = s.total[row] == 0 ? 0 : 1 / s.total[row];
    const float* sums = s.sums.data() + row * padded;
    long d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(sums + d, Full{}) * inverse, Full{});
    if (d < dim) store(out + d, load(sums + d, Full{}) * inverse, Part{int(dim - d)});
  }
}

template <class T>
void run(const Attention& a) {
  const long heads = a.batch * a.heads, blocks = (a.queries + kQueries - 1) / kQueries;
  const long pieces = (a.keys + kKeys - 1) / kKeys, padded = rounded_up(a.dim, kLanes);
  const double work = double(heads) * a.queries * a.keys * a.dim;
  const int threads = int(std::clamp<double>(work / 500000, 1, a.threads));
  const long together = std::min<long>(threads, heads);  // whose keys are packed at a time
  std::vector<Head> packed(together);
  for (Head& head : packed) {
    head.keys.resize(rounded_up(a.keys, kLanes) * a.dim);
    head.values.resize(a.keys * padded);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(a);
    for (long begin = 0; begin < heads; begin += together) {
      const long count = std::min(together, heads - begin);
#pragma omp for schedule(static)
      for (long unit = 0; unit < count * pieces; ++unit) {
        const long head = begin + unit / pieces, first = unit % pieces * kKeys;
        const long item = head / a.heads, index = head % a.heads;
        const T* k = (const T*)a.k + item * a.k_strides[0] + index * a.k_strides[2];
        const T* v = (const T*)a.v + item * a.v_strides[0] + index * a.v_strides[2];
        pack(a, k, v, first, std::min(kKeys, a.keys - first), packed[unit / pieces]);
      }
#pragma omp for schedule(dynamic)
      for (long unit = 0; unit < count * blocks; ++unit) {
        const long head = begin + unit / blocks;
        attend<T>(a, head / a.heads, head % a.heads, unit % blocks * kQueries,
                  packed[unit / blocks], scratch);
      }
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void attention(const Attention* a) {
  if (a->dtype == 0) run<float>(*a);
  if (a->dtype == 1) run<BFloat16>(*a);
  if (a->dtype == 2) run<Float16>(*a);
}
