// Attention in bfloat16 with the products in AMX's tiles; softmax and sums in float32.
#include "attend.h"
#include "tiles.h"

#ifdef KNOWS_TILES

namespace {

// 2^x to 8e-5, for x <= 0; weights are rounded to bfloat16 (4e-3) next. P is fitted on
// [-1/2, 1/2] to the least relative error.
IN_TILES inline __m512 power_of_2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(0.05517167f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24261112f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69326099f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992807f));
  return _mm512_scalef_ps(p, whole);
}

// All matrices are transposed: scores are K Q^T and sums V^T P^T, so that a vector holds 16 queries
// and a softmax is vertical. What lies beyond a head's channels, or beyond the keys that are seen,
// is zero.
struct InTiles {
  using Number = BFloat16;
  using Packed = BFloat16;
  static constexpr long kQueries = 2 * kSide;
  static constexpr long kKeys = 64;  // whole chunks; scores and weights stay in the first cache
  static constexpr float kNone = -1e38f;  // the score of no key: finite, a difference is no NaN
  static constexpr float kLog2e = 1.44269504f;

  struct Scratch {
    Tiles tiles;
    Buffer<BFloat16> queries, weights;  // by tiles of queries, and of chunks of keys
    Buffer<float> scores, sums;         // [keys][queries], [D][queries]
    // Of each query: the largest score times log2(e), and the sum of weights.
    alignas(64) float most[kQueries], total[kQueries];

    explicit Scratch(const Attention& a)
        : queries(kQueries * rounded_up(a.dim, kPairs)),
          weights(kQueries * kKeys),
          scores(kQueries * kKeys),
          sums(kQueries * rounded_up(a.dim, kSide)) {}
  };

  static long keys_size(const Attention& a, long keys) { return keys * rounded_up(a.dim, kPairs); }
  static long values_size(const Attention& a, long keys) { return keys * rounded_up(a.dim, kSide); }

  // Of a block: keys [chunk of channels][keys][32], values [chunk of keys][channels][32].
  static void pack(const Attention& a, const BFloat16* k, const BFloat16* v, const Block& block,
                   long seen, Head<BFloat16>& head) {
    const long depth = rounded_up(a.dim, kPairs), width = rounded_up(a.dim, kSide);
    const long first = block.first, end = rounded_up(block.count, kPairs);
    BFloat16* keys = head.keys.data() + block.at * depth;
    BFloat16* values = head.values.data() + block.at * width;
    std::fill(keys, keys + end * depth, BFloat16{});
    std::fill(values, values + end * width, BFloat16{});
    for (long j = 0; j < seen; ++j) {
      const BFloat16* from = k + (first + j) * a.k_strides[1];
      for (long d = 0; d < a.dim; d += kPairs)
        std::memcpy(keys + d * end + j * kPairs, from + d,
                    std::min(kPairs, a.dim - d) * sizeof(BFloat16));
      from = v + (first + j) * a.v_strides[1];
      BFloat16* to = values + j / kPairs * kPairs * width + j % kPairs;
      for (long d = 0; d < a.dim; ++d) to[d * kPairs] = from[d];
    }
  }

  static void begin(const Attention& a, const BFloat16* q, long rows, Scratch& s) {
    const long depth = rounded_up(a.dim, kPairs);
    for (long row = 0; row < rows; ++row, q += a.q_strides[1]) {  // [tile][pairs of channels][row]
      BFloat16* to = s.queries.data() + row / kSide * kSide * depth + row % kSide * 2;
      for (long d = 0; d + 1 < a.dim; d += 2) std::memcpy(to + d * kSide, q + d, 4);
      if (a.dim % 2) to[(a.dim - 1) * kSide] = q[a.dim - 1];
    }
  }

  static void clear(Scratch& s) {
    std::fill(s.most, s.most + kQueries, kNone);
    std::fill(s.total, s.total + kQueries, 0.f);
    std::fill(s.sums.begin(), s.sums.end(), 0.f);
  }

  static long tiles_of(long rows) { return (rows + kSide - 1) / kSide; }

  IN_TILES static void scores(const Attention& a, const Head<BFloat16>& head, long rows,
                              const Block& block, long, Scratch& s) {
    const long depth = rounded_up(a.dim, kPairs), end = rounded_up(block.count, kPairs);
    Operand k{head.keys.data() + block.at * depth, kTile, end * kPairs, kPairs};
    const Operand q{s.queries.data(), kSide * depth, kTile, kPairs};
    for (long j = 0; j < end; j += kPairs, k.at += 2 * kTile)
      product(2, tiles_of(rows), k, q, depth / kPairs, s.scores.data() + j * kQueries, kQueries,
              false);
  }

  IN_TILES static void weigh(const Attention& a, const float* bias, long rows, long seen,
                             Scratch& s) {
    float factor = float(a.scale) * kLog2e;
    if (bias || factor < 0) {
      for (long j = 0; j < seen; ++j)
        for (long row = 0; row < rows; ++row) {
          float& score = s.scores[j * kQueries + row];
          const float more = bias ? bias[row * a.bias_strides[2] + j * a.bias_strides[3]] : 0;
          score = score * factor + more * kLog2e;
        }
      factor = 1;
    }
    for (long tile = 0; tile < tiles_of(rows); ++tile) weigh_tile(factor, tile, seen, s);
  }

  IN_TILES static void weigh_tile(float factor, long tile, long seen, Scratch& s) {
    const float* scores = s.scores.data() + tile * kSide;
    const __m512 times = _mm512_set1_ps(factor), none = _mm512_set1_ps(kNone);
    __m512 highest = none, highest2 = none;
    for (long j = 0; j + 1 < seen; j += 2) {
      highest = _mm512_max_ps(highest, _mm512_load_ps(scores + j * kQueries));
      highest2 = _mm512_max_ps(highest2, _mm512_load_ps(scores + (j + 1) * kQueries));
    }
    if (seen % 2) highest = _mm512_max_ps(highest, _mm512_load_ps(scores + (seen - 1) * kQueries));
    const __m512 before = _mm512_load_ps(s.most + tile * kSide);
    const __m512 most =
        _mm512_max_ps(before, _mm512_mul_ps(_mm512_max_ps(highest, highest2), times));
    __m512 total = _mm512_load_ps(s.total + tile * kSide), total2 = _mm512_setzero_ps();
    if (_mm512_cmpneq_ps_mask(before, most)) {
      const __m512 less = exponential((before - most) * (1 / kLog2e));
      total = _mm512_mul_ps(total, less);
      for (size_t at = tile * kSide; at < s.sums.size(); at += kQueries)
        _mm512_store_ps(&s.sums[at], _mm512_mul_ps(_mm512_load_ps(&s.sums[at]), less));
    }
    // A query that has seen no key yet: its weights are 0.
    const __m512 from = _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(most, none), most);
    auto weight = [&](long j) IN_TILES {
      const __m512 score = _mm512_fmsub_ps(_mm512_load_ps(scores + j * kQueries), times, from);
      return power_of_2(_mm512_max_ps(none, score));  // a NaN stays
    };
    alignas(64) static constexpr uint16_t kInPairs[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i in_pairs = _mm512_load_si512(kInPairs);
    BFloat16* to = s.weights.data() + tile * kTile;  // [chunk][tile][pairs of keys][query]
    auto at = [&](long j) { return to + j / kPairs * 2 * kTile + j % kPairs * kSide; };
    auto write = [&](long j, __m512 even, __m512 odd) IN_TILES {
      const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);
      _mm512_store_si512(at(j), _mm512_permutexvar_epi16(in_pairs, bits_of<__m512i>(both)));
    };
    long j = 0;
    for (; j + 1 < seen; j += 2) {
      const __m512 even = weight(j), odd = weight(j + 1);
      total = _mm512_add_ps(total, even);
      total2 = _mm512_add_ps(total2, odd);
      write(j, even, odd);
    }
    if (j < seen) {
      const __m512 last = weight(j);
      total = _mm512_add_ps(total, last);
      write(j, last, _mm512_setzero_ps());
      j += 2;
    }
    for (; j < rounded_up(seen, kPairs); j += 2) _mm512_store_si512(at(j), _mm512_setzero_si512());
    _mm512_store_ps(s.most + tile * kSide, most);
    _mm512_store_ps(s.total + tile * kSide, _mm512_add_ps(total, total2));
  }

  IN_TILES static void add_up(const Attention& a, const Head<BFloat16>& head, long rows,
                              const Block& block, long seen, Scratch& s) {
    const long width = rounded_up(a.dim, kSide), chunks = (seen + kPairs - 1) / kPairs;
    Operand v{head.values.data() + block.at * width, kTile, width * kPairs, kPairs};
    const Operand p{s.weights.data(), kTile, 2 * kTile, kPairs};
    for (long d = 0; d < width; d += 2 * kSide, v.at += 2 * kTile)
      product((width - d) / kSide, tiles_of(rows), v, p, chunks, s.sums.data() + d * kQueries,
              kQueries, true);
  }

  IN_TILES static void end(const Attention& a, long rows, const float*, BFloat16* out, Scratch& s) {
    for (long row = 0; row < kQueries; ++row)
      s.total[row] = s.total[row] == 0 ? 0 : 1 / s.total[row];
    __m512i by_channel = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    by_channel = _mm512_mullo_epi32(by_channel, _mm512_set1_epi32(kQueries));
    for (long row = 0; row < rows; ++row, out += a.heads * a.dim)
      for (long d = 0; d < a.dim; d += kSide) {
        const float* sums = s.sums.data() + d * kQueries + row;
        const __m512 values =
            _mm512_mul_ps(_mm512_i32gather_ps(by_channel, sums, 4), _mm512_set1_ps(s.total[row]));
        const __m256bh rounded = _mm512_cvtneps_pbh(values);
        std::memcpy(out + d, &rounded, std::min(kSide, a.dim - d) * sizeof(BFloat16));
      }
  }
};

}  // namespace

bool attention_in_tiles(const Attention& a) {
  if (!a.tiles || a.parts_count > 1 || !tiles_here()) return false;
  run<InTiles>(a);
  return true;
}

#else

bool attention_in_tiles(const Attention&) { return false; }

#endif
