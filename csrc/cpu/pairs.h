// What both ways of attention whose products are in bfloat16 share; sums and softmax are in
// float32. Such a product adds up two neighbors of its depth at once: they lie side by side, in
// pairs of channels or of keys. Functions that use the instructions are IN_PAIRS.
#pragma once

#include "instructions.h"
#include "product.h"
#include "sums.h"
#include "vector.h"

// Defined where the compiler knows the instructions. Code that uses them asks pairs_here() before.
#if defined(__AVX512F__) && __has_include(<avx512bf16intrin.h>)
#define KNOWS_PAIRS
#endif

#ifdef KNOWS_PAIRS
#define IN_PAIRS __attribute__((target("avx512bf16")))

namespace {

// As many of the 32 numbers of a vector as there are; zeros past them.
inline __m512i load_some(const BFloat16* from, long count) {
  return _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, from);
}

// A depth is padded with zeros to whole chunks: kChunk numbers, that a product takes at once.
template <long kOfQueries, long kOfKeys, long kChunk>
struct InPairs {
  using Number = BFloat16;
  using Packed = BFloat16;
  static constexpr long kQueries = kOfQueries, kKeys = kOfKeys;
  static constexpr long kRow = 2 * kQueries;  // numbers of a pair's row

  struct Scratch : Sums<kQueries> {
    Buffer<BFloat16> queries, weights;  // [pairs of channels or keys][queries][2]
    Buffer<float> scores;               // [keys][queries]

    explicit Scratch(const Attention& a)
        : Sums<kQueries>(a),
          queries(rounded_up(a.dim, kChunk) * kQueries),
          weights(rounded_up(kKeys, kChunk) * kQueries),
          scores(rounded_up(kKeys, kChunk) * kQueries) {}
  };

  static void begin(const Attention& a, const BFloat16* q, long rows, Scratch& s) {
    const long pairs = (a.dim + 1) / 2;
    float* pair = s.rows.data();
    for (long row = 0; row < rows; ++row, q += a.q_strides[1], pair += s.row)
      for (long d = 0; d < a.dim; d += 32)
        _mm512_storeu_si512(pair + d / 2, load_some(q + d, a.dim - d));
    transpose(s.rows.data(), s.row, rows, pairs, (float*)s.queries.data(), kQueries);
  }

  static void clear(Scratch& s) { s.clear(); }

  static void weigh(const Attention& a, const float* bias, long rows, long seen, Scratch& s) {
    constexpr float kLog2E = float(Scratch::kLog2E);
    float factor = float(a.scale) * kLog2E;
    if (bias || factor < 0) {
      for (long j = 0; j < seen; ++j)
        for (long row = 0; row < rows; ++row) {
          float& score = s.scores[j * kQueries + row];
          const float more = bias ? bias[row * a.bias_strides[2] + j * a.bias_strides[3]] : 0;
          score = score * factor + more * kLog2E;
        }
      factor = 1;
    }
    for (long at = 0; at < vectors_of(rows) * kLanes; at += kLanes)
      weigh_vector(factor, at, seen, s);
  }

  IN_PAIRS static void weigh_vector(float factor, long at, long seen, Scratch& s) {
    auto score = [&](long j) { return load(&s.scores[j * kQueries + at], Full{}); };
    Vec highest[2] = {score(0), score(0)};
    long j = 0;
    for (; j + 2 <= seen; j += 2)
      for (int i = 0; i < 2; ++i) highest[i] = larger(score(j + i), highest[i]);
    if (j < seen) highest[0] = larger(score(j), highest[0]);
    const Vec from = s.raise(at, larger(highest[0], highest[1]) * factor);
    auto weight = [&](long j) { return about_power_of_two(score(j) * factor - from); };
    alignas(64) static constexpr uint16_t kInPairs[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i in_pairs = _mm512_load_si512(kInPairs);
    BFloat16* to = &s.weights[2 * at];
    auto write = [&](long j, Vec even, Vec odd) IN_PAIRS {
      const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);
      _mm512_store_si512(to + j / 2 * kRow,
                         _mm512_permutexvar_epi16(in_pairs, bits_of<__m512i>(both)));
    };
    Vec totals[2] = {};
    for (j = 0; j + 2 <= seen; j += 2) {
      const Vec even = weight(j), odd = weight(j + 1);
      totals[0] += even, totals[1] += odd;
      write(j, even, odd);
    }
    if (j < seen) {
      const Vec last = weight(j);
      totals[0] += last;
      write(j, last, Vec{});
      j += 2;
    }
    for (; j < rounded_up(seen, kChunk); j += 2)
      _mm512_store_si512(to + j / 2 * kRow, _mm512_setzero_si512());
    store(s.total + at, load(s.total + at, Full{}) + (totals[0] + totals[1]), Full{});
  }

  static void end(const Attention& a, long rows, const float* weights, BFloat16* out, float* lse,
                  Scratch& s) {
    s.write(a, rows, weights, out, lse);
  }
};

}  // namespace
#endif
