// softmax(scale Q K^T + bias) V by blocks of queries and keys, with a running maximum (Milakov &
// Gimelshein 2018; Dao et al. 2022): the scores of a block stay in the cache. How all of it is
// computed is a Way:
//
//   Number                    of q, k, v and out
//   Packed                    of keys and values as its products read them
//   kQueries, kKeys           of a block
//   Scratch(a)                what a thread works with
//   keys_size, values_size    numbers of a packed head
//   pack(a, k, v, first, count, seen, head)   keys [first, first + count), of which `seen` are seen
//   begin(a, q, rows, s)      takes a block of queries; nothing is summed yet
//   scores(a, head, rows, first, count, s)    of the block's queries and such keys
//   weigh(a, bias, rows, seen, s)             scores to weights; older sums scaled to match
//   add_up(a, head, rows, first, count, seen, s)   weights times values onto the sums
//   end(a, rows, out, s)      writes the sums by the sums of their weights
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "vector.h"

namespace {

inline long keys_seen(const Attention& a, long item) {
  return a.lengths ? std::min<long>(a.lengths[item], a.keys) : a.keys;
}

// Keys and values of a head.
template <class Packed>
struct Head {
  Buffer<Packed> keys, values;
};

template <class Way>
void attend(const Attention& a, long item, long index, long begin,
            const Head<typename Way::Packed>& head, typename Way::Scratch& s) {
  using Number = typename Way::Number;
  const long rows = std::min(Way::kQueries, a.queries - begin);
  const Number* q = (const Number*)a.q + item * a.q_strides[0] + index * a.q_strides[2];
  Way::begin(a, q + begin * a.q_strides[1], rows, s);
  const float* bias = nullptr;
  const int64_t* by = a.bias_strides;
  const long length = keys_seen(a, item);
  for (long first = 0; first < length; first += Way::kKeys) {
    const long count = std::min(Way::kKeys, a.keys - first), seen = std::min(count, length - first);
    Way::scores(a, head, rows, first, count, s);
    if (a.bias) bias = a.bias + item * by[0] + index * by[1] + begin * by[2] + first * by[3];
    Way::weigh(a, bias, rows, seen, s);
    Way::add_up(a, head, rows, first, count, seen, s);
  }
  Way::end(a, rows, (Number*)a.out + ((item * a.queries + begin) * a.heads + index) * a.dim, s);
}

template <class Way>
void run(const Attention& a) {
  using Number = typename Way::Number;
  const long heads = a.batch * a.heads, blocks = (a.queries + Way::kQueries - 1) / Way::kQueries;
  const long pieces = (a.keys + Way::kKeys - 1) / Way::kKeys;
  const double work = double(heads) * a.queries * a.keys * a.dim;
  const int threads = int(std::clamp<double>(work / 500000, 1, a.threads));
  const long together = std::min<long>(threads, heads);  // whose keys are packed at a time
  std::vector<Head<typename Way::Packed>> packed(together);
  for (auto& head : packed) {
    head.keys.resize(Way::keys_size(a));
    head.values.resize(Way::values_size(a));
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    typename Way::Scratch scratch(a);
    for (long begin = 0; begin < heads; begin += together) {
      const long count = std::min(together, heads - begin);
#pragma omp for schedule(static)
      for (long unit = 0; unit < count * pieces; ++unit) {
        const long head = begin + unit / pieces, first = unit % pieces * Way::kKeys;
        const long item = head / a.heads, index = head % a.heads;
        const Number* k = (const Number*)a.k + item * a.k_strides[0] + index * a.k_strides[2];
        const Number* v = (const Number*)a.v + item * a.v_strides[0] + index * a.v_strides[2];
        const long seen = keys_seen(a, item) - first;
        if (seen > 0)
          Way::pack(a, k, v, first, std::min(Way::kKeys, a.keys - first), seen,
                    packed[unit / pieces]);
      }
#pragma omp for schedule(dynamic)
      for (long unit = 0; unit < count * blocks; ++unit) {
        const long head = begin + unit / blocks;
        attend<Way>(a, head / a.heads, head % a.heads, unit % blocks * Way::kQueries,
                    packed[unit / blocks], scratch);
      }
    }
  }
}

}  // namespace
