// softmax(scale Q K^T + bias) V by blocks of queries and keys, with a running maximum (Milakov &
// Gimelshein 2018; Dao et al. 2022): the scores of a block stay in the cache. Keys may come in
// parts, each with a softmax of its own: the sum of their results, weighted. How all of it is
// computed is a Way:
//
//   Number                    of q, k, v and out
//   Packed                    of keys and values as its products read them
//   kQueries, kKeys           of a block
//   Scratch(a)                what a thread works with
//   keys_size, values_size    numbers of a packed head, of so many keys
//   pack(a, k, v, block, seen, head)   the block's keys, of which `seen` are seen
//   begin(a, q, rows, s)      takes a block of queries
//   clear(s)                  nothing is summed yet
//   scores(a, head, rows, block, seen, s)   of the block's queries and such keys
//   weigh(a, bias, rows, seen, s)      scores to weights; older sums scaled to match
//   add_up(a, head, rows, block, seen, s)   weights times values onto the sums
//   end(a, rows, weights, out, lse, s) writes the sums by the sums of their weights; or with the
//                                      weights of a part adds them, weighted
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "threads.h"
#include "vector.h"

namespace {

// Keys [first, first + count), which are of one part; in a packed head they begin at `at`.
struct Block {
  long first, count, at, part;
};

constexpr long kWhole = 32;  // keys that every Way packs as whole vectors, chunks and panels

inline long packed_end(const Block& block) { return block.at + rounded_up(block.count, kWhole); }

// All keys in blocks of at most so many.
inline std::vector<Block> blocks_of(const Attention& a, long most) {
  std::vector<Block> blocks;
  long first = 0;
  for (long part = 0; part < a.parts_count; ++part)
    for (const long end = first + a.parts[part]; first < end; first += blocks.back().count)
      blocks.push_back({first, std::min(most, end - first),
                        blocks.empty() ? 0 : packed_end(blocks.back()), part});
  return blocks;
}

// How many of a block's keys an item sees.
inline long keys_seen(const Attention& a, long item, const Block& block) {
  if (!a.lengths || block.part > 0) return block.count;
  return std::clamp<long>(a.lengths[item] - block.first, 0, block.count);
}

// Keys and values of a head.
template <class Packed>
struct Head {
  Buffer<Packed> keys, values;
};

template <class Way>
void attend(const Attention& a, const std::vector<Block>& blocks, long item, long index, long begin,
            const Head<typename Way::Packed>& head, typename Way::Scratch& s) {
  using Number = typename Way::Number;
  const long rows = std::min(Way::kQueries, a.queries - begin);
  const Number* q = (const Number*)a.q + item * a.q_strides[0] + index * a.q_strides[2];
  Number* out = (Number*)a.out + ((item * a.queries + begin) * a.heads + index) * a.dim;
  Way::begin(a, q + begin * a.q_strides[1], rows, s);
  const float *bias = nullptr, *weights = nullptr;
  const int64_t *by = a.bias_strides, *of = a.weights_strides;
  for (auto block = blocks.begin(); block != blocks.end(); ++block) {
    if (block == blocks.begin() || block[-1].part < block->part) Way::clear(s);
    if (const long seen = keys_seen(a, item, *block); seen > 0) {
      Way::scores(a, head, rows, *block, seen, s);
      if (a.bias)
        bias = a.bias + item * by[0] + index * by[1] + begin * by[2] + block->first * by[3];
      Way::weigh(a, bias, rows, seen, s);
      Way::add_up(a, head, rows, *block, seen, s);
    }
    if (block + 1 != blocks.end() && block[1].part == block->part) continue;
    if (block->part > 0)
      weights = a.weights + item * of[0] + (block->part - 1) * of[1] + begin * of[2];
    float* lse = a.lse ? a.lse + (item * a.heads + index) * a.queries + begin : nullptr;
    Way::end(a, rows, weights, out, lse, s);
  }
}

template <class Way>
void run(const Attention& a) {
  using Number = typename Way::Number;
  const long heads = a.batch * a.heads, turns = (a.queries + Way::kQueries - 1) / Way::kQueries;
  const std::vector<Block> blocks = blocks_of(a, Way::kKeys);
  const long pieces = blocks.size();
  const double work = double(heads) * a.queries * a.keys * a.dim;
  const int threads = threads_for_products(work, a.threads);
  const long together = std::min<long>(threads, heads);  // whose keys are packed at a time
  std::vector<Head<typename Way::Packed>> packed(together);
  for (auto& head : packed) {
    head.keys.resize(Way::keys_size(a, packed_end(blocks.back())));
    head.values.resize(Way::values_size(a, packed_end(blocks.back())));
  }
  std::atomic<bool> failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Own<typename Way::Scratch> scratch(failed, a);
#pragma omp barrier
    for (long begin = 0; begin < heads && !failed; begin += together) {
      const long count = std::min(together, heads - begin);
#pragma omp for schedule(static)
      for (long unit = 0; unit < count * pieces; ++unit) {
        const Block& block = blocks[unit % pieces];
        const long head = begin + unit / pieces;
        const long item = head / a.heads, index = head % a.heads;
        const Number* k = (const Number*)a.k + item * a.k_strides[0] + index * a.k_strides[2];
        const Number* v = (const Number*)a.v + item * a.v_strides[0] + index * a.v_strides[2];
        const long seen = keys_seen(a, item, block);
        if (seen > 0) Way::pack(a, k, v, block, seen, packed[unit / pieces]);
      }
#pragma omp for schedule(dynamic)
      for (long unit = 0; unit < count * turns; ++unit) {
        const long head = begin + unit / turns;
        attend<Way>(a, blocks, head / a.heads, head % a.heads, unit % turns * Way::kQueries,
                    packed[unit / turns], *scratch);
      }
    }
  }
  check(failed);
}

}  // namespace
