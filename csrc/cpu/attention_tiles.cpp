// Attention in bfloat16 with the products in AMX's tiles.
#include "attend.h"
#include "pairs.h"
#include "tiles.h"

#ifdef KNOWS_TILES

namespace {

struct InTiles : InPairs<2 * kSide, 64, kPairs> {
  struct Scratch : InPairs::Scratch {
    using InPairs::Scratch::Scratch;
    Tiles tiles;
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

  IN_TILES static void scores(const Attention& a, const Head<BFloat16>& head, long rows,
                              const Block& block, long, Scratch& s) {
    const long depth = rounded_up(a.dim, kPairs), end = rounded_up(block.count, kPairs);
    Operand k{head.keys.data() + block.at * depth, kTile, end * kPairs, kPairs};
    const Operand q{s.queries.data(), kPairs, kSide * kRow, kRow};
    for (long j = 0; j < end; j += kPairs, k.at += 2 * kTile)
      product(2, vectors_of(rows), k, q, depth / kPairs, s.scores.data() + j * kQueries, kQueries,
              false);
  }

  IN_TILES static void add_up(const Attention& a, const Head<BFloat16>& head, long rows,
                              const Block& block, long seen, Scratch& s) {
    const long width = rounded_up(a.dim, kSide), chunks = (seen + kPairs - 1) / kPairs;
    Operand v{head.values.data() + block.at * width, kTile, width * kPairs, kPairs};
    const Operand p{s.weights.data(), kPairs, kSide * kRow, kRow};
    for (long d = 0; d < width; d += 2 * kSide, v.at += 2 * kTile)
      product((width - d) / kSide, vectors_of(rows), v, p, chunks, s.sums.data() + d * kQueries,
              kQueries, !s.empty);
    s.empty = false;
  }
};

}  // namespace

bool attention_in_tiles(const Attention& a) {
  if (a.best < 2 || !tiles_here()) return false;
  run<InTiles>(a);
  return true;
}

#else

bool attention_in_tiles(const Attention&) { return false; }

#endif
