// Products of bfloat16 matrices in AMX's tiles, summed in float32. Functions that use them are
// IN_TILES.
#pragma once

#include "instructions.h"
#include "vector.h"

// Defined where the compiler knows the instructions. Code that uses them asks tiles_here() before.
#if defined(__AVX512F__) && __has_include(<amxbf16intrin.h>)
#define KNOWS_TILES
#endif

#ifdef KNOWS_TILES
#define IN_TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

namespace {

constexpr long kSide = 16;              // rows of a tile; columns of float32
constexpr long kPairs = 32;             // columns of bfloat16: a chunk of a product's depth
constexpr long kTile = kSide * kPairs;  // numbers of a tile of bfloat16

// Makes the compiler write what comes before: GCC's intrinsics don't say all that they read.
inline void in_memory() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 for sums, two rows by two columns; 4 and 5 for rows of a, 6 and 7 for columns of b.
// While this lives, the thread's tiles are 16 rows of 64 bytes; then they are as before.
class Tiles {
 public:
  IN_TILES Tiles() {
    _tile_storeconfig(&before_);
    in_memory();
    Config ours = {};
    ours.palette = 1;
    for (int tile = 0; tile < 8; ++tile) ours.bytes[tile] = 64, ours.rows[tile] = kSide;
    in_memory();
    _tile_loadconfig(&ours);
  }
  IN_TILES ~Tiles() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// A matrix of bfloat16 by tiles, and how far apart they lie: one and the next, one chunk of the
// product's depth and the next, a tile's row and the next. On the right a tile is 16 pairs of rows
// of the depth by 16 columns.
struct Operand {
  const BFloat16* at;
  long tile, chunk, row;
};

// c (+)= a b, for kRows by kColumns tiles side by side, with c_row numbers between rows of c.
template <int kRows, int kColumns>
IN_TILES inline void product(const Operand& a, const Operand& b, long chunks, float* c, long c_row,
                             bool onto) {
  static_assert(kRows <= 2 && kColumns <= 2);
  in_memory();
  const long row = 4 * c_row;  // bytes
  float* below = c + kSide * c_row;
  if (onto) {
    _tile_loadd(0, c, row);
    if (kColumns > 1) _tile_loadd(1, c + kSide, row);
    if (kRows > 1) _tile_loadd(2, below, row);
    if (kRows > 1 && kColumns > 1) _tile_loadd(3, below + kSide, row);
  } else {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1) _tile_zero(2);
    if (kRows > 1 && kColumns > 1) _tile_zero(3);
  }
  const BFloat16 *left = a.at, *right = b.at;
  for (long chunk = 0; chunk < chunks; ++chunk, left += a.chunk, right += b.chunk) {
    _tile_loadd(6, right, 2 * b.row);
    _tile_loadd(4, left, 2 * a.row);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns > 1) {
      _tile_loadd(7, right + b.tile, 2 * b.row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows > 1) {
      _tile_loadd(5, left + a.tile, 2 * a.row);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, row);
  if (kColumns > 1) _tile_stored(1, c + kSide, row);
  if (kRows > 1) _tile_stored(2, below, row);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, below + kSide, row);
}

IN_TILES inline void product(long rows, long columns, const Operand& a, const Operand& b,
                             long chunks, float* c, long c_row, bool onto) {
  if (rows > 1 && columns > 1) return product<2, 2>(a, b, chunks, c, c_row, onto);
  if (rows > 1) return product<2, 1>(a, b, chunks, c, c_row, onto);
  if (columns > 1) return product<1, 2>(a, b, chunks, c, c_row, onto);
  product<1, 1>(a, b, chunks, c, c_row, onto);
}

}  // namespace
#endif
