// The gradients of attention in float32 (Dao et al. 2022, algorithm 4): with P = exp(scores - lse),
// delta = rowsum(grad * out) and dS = P * (grad V^T - delta)
//
//   dV = P^T grad,  dK = scale dS^T Q,  dQ = scale dS K.
//
// A thread has a head. Scores are transposed, so that a vector holds queries, and computed once
// more by blocks of keys and queries; what a group of keys needs stays in the cache for all
// queries.
#include <algorithm>
#include <limits>

#include "attention.h"
#include "buffer.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr long kQueries = 64, kKeys = 64;  // of a block
constexpr long kGroup = 512;               // keys that go over all queries together
constexpr double kLog2E = 1.4426950408889634;

// c[r][0 to width] (+)= a[r][depth] b[depth][0 to width] in tiles; a width in whole vectors.
void product(const float* a, long a_row, long a_step, const float* b, long b_row, long depth,
             float* c, long c_row, long rows, long width, bool onto) {
  for (long r = 0; r < rows; r += kTileRows)
    for (long n = 0; n < width; n += kPanel)
      tile_of(rows - r, vectors_of(width - n), a + r * a_row, a_row, a_step, b + n, b_row, depth,
              c + r * c_row + n, c_row, onto);
}

// A head's numbers: as rows of whole vectors, and where a product has queries as its columns, as
// blocks [D][queries].
struct Rows {
  long row;
  Buffer<float> numbers;
  Rows(long count, long dim)
      : row(rounded_up(dim, kLanes)), numbers(rounded_up(count, kQueries) * row) {}
  float* at(long index) { return numbers.data() + index * row; }
  void read(const float* from, long stride, long count, long dim) {
    for (long i = 0; i < count; ++i) std::copy_n(from + i * stride, dim, at(i));
  }
  void write(float* to, long stride, long count, long dim, float factor) {
    for (long i = 0; i < count; ++i)
      for (long d = 0; d < dim; ++d) to[i * stride + d] = at(i)[d] * factor;
  }
};

struct Columns {
  long dim;
  Buffer<float> numbers;
  Columns(long count, long dim) : dim(dim), numbers(rounded_up(count, kQueries) * dim) {}
  float* at(long block) { return numbers.data() + block * kQueries * dim; }
  void read(Rows& rows, long count, float factor) {
    for (long block = 0; block * kQueries < count; ++block) {
      float* to = at(block);
      transpose(rows.at(block * kQueries), rows.row, std::min(kQueries, count - block * kQueries),
                dim, to, kQueries);
      for (long i = 0; i < kQueries * dim; ++i) to[i] *= factor;
    }
  }
};

struct Head {
  Rows q, grad, dq, k, v, dk, dv;
  Columns q_columns, grad_columns;
  Buffer<float> lse, delta;         // of queries; an infinite lse leaves no weight
  Buffer<float> weights, dweights;  // of a block, [keys][queries]

  explicit Head(const AttentionGradients& a)
      : q(a.queries, a.dim),
        grad(a.queries, a.dim),
        dq(a.queries, a.dim),
        k(a.keys, a.dim),
        v(a.keys, a.dim),
        dk(a.keys, a.dim),
        dv(a.keys, a.dim),
        q_columns(a.queries, a.dim),
        grad_columns(a.queries, a.dim),
        lse(rounded_up(a.queries, kQueries)),
        delta(rounded_up(a.queries, kQueries)),
        weights(kKeys * kQueries),
        dweights(kKeys * kQueries) {}

  void begin(const AttentionGradients& a, long item, long index, long seen) {
    auto place = [&](const float* from, const int64_t* strides) {
      return from + item * strides[0] + index * strides[2];
    };
    q.read(place(a.q, a.q_strides), a.q_strides[1], a.queries, a.dim);
    grad.read(place(a.grad, a.grad_strides), a.grad_strides[1], a.queries, a.dim);
    k.read(place(a.k, a.k_strides), a.k_strides[1], seen, a.dim);
    v.read(place(a.v, a.v_strides), a.v_strides[1], seen, a.dim);
    q_columns.read(q, a.queries, float(a.scale * kLog2E));
    grad_columns.read(grad, a.queries, 1);
    for (Rows* sums : {&dq, &dk, &dv}) std::fill(sums->numbers.begin(), sums->numbers.end(), 0.f);
    const float* out = place(a.out, a.out_strides);
    const float* given = a.lse + (item * a.heads + index) * a.queries;
    constexpr float kInfinite = std::numeric_limits<float>::infinity();
    std::fill(lse.begin(), lse.end(), kInfinite);
    for (long i = 0; i < a.queries; ++i) {
      float sum = 0;
      for (long d = 0; d < a.dim; ++d) sum += grad.at(i)[d] * out[i * a.out_strides[1] + d];
      delta[i] = sum;
      if (given[i] != -kInfinite) lse[i] = float(given[i] * kLog2E);
    }
  }

  // Keys [first, first + count) with a block of queries.
  void add(long first, long count, long block) {
    const long dim = q_columns.dim, query = block * kQueries;
    product(k.at(first), k.row, 1, q_columns.at(block), kQueries, dim, weights.data(), kQueries,
            count, kQueries, false);
    product(v.at(first), v.row, 1, grad_columns.at(block), kQueries, dim, dweights.data(), kQueries,
            count, kQueries, false);
    for (long at = 0; at < kQueries; at += kLanes) {
      const Vec from = load(&lse[query + at], Full{}), mean = load(&delta[query + at], Full{});
      for (long j = 0; j < count; ++j) {
        float *weight = &weights[j * kQueries + at], *dweight = &dweights[j * kQueries + at];
        const Vec p = power_of_two(load(weight, Full{}) - from);
        store(weight, p, Full{});
        store(dweight, p * (load(dweight, Full{}) - mean), Full{});
      }
    }
    product(weights.data(), kQueries, 1, grad.at(query), grad.row, kQueries, dv.at(first), dv.row,
            count, dv.row, true);
    product(dweights.data(), kQueries, 1, q.at(query), q.row, kQueries, dk.at(first), dk.row, count,
            dk.row, true);
    product(dweights.data(), 1, kQueries, k.at(first), k.row, count, dq.at(query), dq.row, kQueries,
            dq.row, true);
  }

  void end(const AttentionGradients& a, long item, long index) {
    const long stride = a.heads * a.dim;
    auto place = [&](float* to, long rows) { return to + item * rows * stride + index * a.dim; };
    dq.write(place(a.dq, a.queries), stride, a.queries, a.dim, float(a.scale));
    dk.write(place(a.dk, a.keys), stride, a.keys, a.dim, float(a.scale));
    dv.write(place(a.dv, a.keys), stride, a.keys, a.dim, 1);
  }
};

void run(const AttentionGradients& a) {
  const long heads = a.batch * a.heads, blocks = (a.queries + kQueries - 1) / kQueries;
  const double work = 2.5 * heads * a.queries * a.keys * a.dim;
  const int threads = std::min<long>(threads_for_products(work, a.threads), heads);
  std::atomic<bool> failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Own<Head> head(failed, a);
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < (failed ? 0 : heads); ++unit) {
      const long item = unit / a.heads, index = unit % a.heads;
      const long seen = a.lengths ? std::clamp<long>(a.lengths[item], 0, a.keys) : a.keys;
      head->begin(a, item, index, seen);
      for (long group = 0; group < seen; group += kGroup)
        for (long block = 0; block < blocks; ++block)
          for (long first = group; first < std::min(group + kGroup, seen); first += kKeys)
            head->add(first, std::min(kKeys, std::min(group + kGroup, seen) - first), block);
      head->end(a, item, index);
    }
  }
  check(failed);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int attention_gradients(
    const AttentionGradients* a) {
  return out_of_memory([&] { run(*a); });
}
