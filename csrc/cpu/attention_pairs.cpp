// Attention in bfloat16 with the products in AVX512-BF16.
#include "attend.h"
#include "pairs.h"

#ifdef KNOWS_PAIRS

namespace {

// The tile of product.h, of pairs: c[r][n] (+)= sum over k < depth and i < 2 of
// a[r * a_row + k * a_step + i] b[k * b_row + 2 n + i].
template <int kRows, int kVectors>
IN_PAIRS inline void tile(const BFloat16* a, long a_row, long a_step, const BFloat16* b, long b_row,
                          long depth, float* c, long c_row, bool onto) {
  __m512 sums[kRows][kVectors] = {};
  for (long k = 0; k < depth; ++k) {
    __m512bh column[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n)
      column[n] = load_as<__m512bh>(b + k * b_row + n * 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i one = _mm512_set1_epi32(load_as<int>(a + r * a_row + k * a_step));
      for (int n = 0; n < kVectors; ++n)
        sums[r][n] = _mm512_dpbf16_ps(sums[r][n], column[n], bits_of<__m512bh>(one));
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

// Keys are packed as rows [keys][D], D rounded up to pairs; values by groups of channels,
// [group][pairs of keys][width][2].
struct Pairs : InPairs<kPanel, 128, 2> {
  static constexpr long kGroup = 8 * kTileRows;  // the first cache holds values of so many channels

  static long keys_size(const Attention& a, long keys) { return keys * rounded_up(a.dim, 2); }
  static long values_size(const Attention& a, long keys) { return keys * a.dim; }

  static void pack(const Attention& a, const BFloat16* k, const BFloat16* v, const Block& block,
                   long seen, Head<BFloat16>& head) {
    const long depth = rounded_up(a.dim, 2), end = rounded_up(block.count, 2);
    BFloat16* keys = head.keys.data() + block.at * depth;
    BFloat16* values = head.values.data() + block.at * a.dim;
    k += block.first * a.k_strides[1], v += block.first * a.v_strides[1];
    for (long j = 0; j < seen; ++j, k += a.k_strides[1], keys += depth)
      for (long d = 0; d < depth; d += 32)
        store_some(keys + d, load_some(k + d, a.dim - d), depth - d);
    for (long j = 0; j < seen; j += 2, v += 2 * a.v_strides[1])
      for (long d = 0; d < a.dim; d += kGroup) {
        const long width = std::min(kGroup, a.dim - d);
        BFloat16* to = values + d * end + j * width;
        for (long i = 0; i < width; i += kLanes) {
          const long count = std::min<long>(kLanes, width - i);
          auto load = [&](const BFloat16* from) {
            return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(load_some(from, count)));
          };
          const __m512i first = load(v + d + i);
          const __m512i second = j + 1 < seen ? load(v + a.v_strides[1] + d + i) : __m512i{};
          store_some(to + 2 * i, first | _mm512_slli_epi32(second, 16), 2 * count);
        }
      }
  }

  static void store_some(BFloat16* to, __m512i value, long count) {
    _mm512_mask_storeu_epi16(to, count < 32 ? (1u << count) - 1 : ~0u, value);
  }

  static void scores(const Attention& a, const Head<BFloat16>& head, long rows, const Block& block,
                     long seen, Scratch& s) {
    const long pairs = (a.dim + 1) / 2, depth = depth_of(pairs);
    const BFloat16* keys = head.keys.data() + block.at * 2 * pairs;
    for (long d = 0; d < pairs; d += depth)
      for (long j = 0; j < seen; j += kTileRows)
        tile_of(seen - j, vectors_of(rows), keys + j * 2 * pairs + d * 2, 2 * pairs, 2,
                s.queries.data() + d * kRow, kRow, std::min(depth, pairs - d),
                s.scores.data() + j * kQueries, kQueries, d > 0);
  }

  static void add_up(const Attention& a, const Head<BFloat16>& head, long rows, const Block& block,
                     long seen, Scratch& s) {
    const long end = rounded_up(block.count, 2);
    const BFloat16* values = head.values.data() + block.at * a.dim;
    for (long d = 0; d < a.dim; d += kTileRows) {
      const long group = d / kGroup * kGroup, width = std::min(kGroup, a.dim - group);
      tile_of(a.dim - d, vectors_of(rows), values + group * end + d % kGroup * 2, 2, 2 * width,
              s.weights.data(), kRow, (seen + 1) / 2, s.sums.data() + d * kQueries, kQueries,
              !s.empty);
    }
    s.empty = false;
  }
};

}  // namespace

bool attention_in_pairs(const Attention& a) {
  if (a.best < 1 || !pairs_here()) return false;
  run<Pairs>(a);
  return true;
}

#else

bool attention_in_pairs(const Attention&) { return false; }

#endif
