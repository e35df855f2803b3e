// y = x W^T + bias, then y = first half * gelu(second half) where it is gated, then + residual.
// Blocks of rows by groups of panels are shared out; what follows the product is computed while its
// sums are in the cache.
#include "linear.h"

#include "buffer.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr long kBlock = 16 * kTileRows;  // rows whose numbers stay in the cache for all panels
constexpr long kGroup = 256 / kPanel;    // panels whose sums do
// A line between: rows of a power of two would share the cache's sets.
constexpr long kValuesRow = kDepth + kLine;

// How many columns a packed matrix has, and of how many matrices the weight consists.
struct Columns {
  long real, padded, parts;
  Columns(long outputs, bool geglu)
      : real(geglu ? outputs / 2 : outputs), padded(rounded_up(real, kLine)), parts(1 + geglu) {}
};

// Columns [begin, begin + count) of a row, from their sums.
template <bool kGated>
void finish(const Linear& l, const Columns& columns, const float* sums, long gates, long row,
            long begin, long count) {
  const float* bias = l.bias ? l.bias + begin : nullptr;
  const long at = row * columns.real + begin;
  auto vector = [&](long c, auto lanes) {
    Vec y = load(sums + c, Full{});
    if (bias) y += load(bias + c, lanes);
    if constexpr (kGated) {
      Vec gate = load(sums + gates + c, Full{});
      if (bias) gate += load(bias + columns.real + c, lanes);
      y *= gelu(gate);
    }
    if (l.residual) y += load(l.residual + at + c, lanes);
    store(l.y + at + c, y, lanes);
  };
  long c = 0;
  for (; c + kLanes <= count; c += kLanes) vector(c, Full{});
  if (c < count) vector(c, Part{int(count - c)});
}

// Rows that a thread works on: what it multiplies, and the sums.
struct Rows {
  Memory values, sums;
  Rows(long count, long sums_row)
      : values(allocate(count * kValuesRow)), sums(allocate(count * sums_row)) {}
};

template <bool kGated>
void run(const Linear& l) {
  const Columns columns(l.outputs, kGated);
  const long blocks = (l.rows + kBlock - 1) / kBlock;
  const long panels = (columns.padded + kPanel - 1) / kPanel;
  const long most_depth = depth_of(l.inner);
  const double work = double(l.rows) * l.inner * l.outputs;
  const int threads = threads_for_products(work, l.threads);
  const long least = std::max((panels + kGroup - 1) / kGroup, (4L * threads + blocks - 1) / blocks);
  const long groups = std::min(least, panels);
  const long gates = (panels + groups - 1) / groups * kPanel,
             sums_row = columns.parts * gates + kLine;
  std::atomic<bool> failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Own<Rows> own(failed, std::min(kBlock, l.rows), sums_row);
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < (failed ? 0 : blocks * groups); ++unit) {
      float *values = own->values.get(), *sums = own->sums.get();
      const long first = unit / groups * kBlock, group = unit % groups;
      const long rows = std::min(kBlock, l.rows - first);
      const long begin = panels * group / groups * kPanel;
      const long end = std::min(panels * (group + 1) / groups * kPanel, columns.padded);
      for (long d = 0; d < l.inner; d += most_depth) {
        const long depth = std::min(most_depth, l.inner - d);
        for (long row = 0; row < rows; ++row)
          std::copy_n(l.x + (first + row) * l.inner + d, depth, values + row * kValuesRow);
        for (long part = 0; part < columns.parts; ++part)
          multiply({values, kValuesRow},
                   {l.weight + part * l.inner * columns.padded, l.inner, columns.padded}, d, depth,
                   sums + part * gates, sums_row, rows, begin, end, d > 0);
      }
      for (long row = 0; row < rows; ++row)
        finish<kGated>(l, columns, sums + row * sums_row, gates, first + row, begin,
                       std::min(end, columns.real) - begin);
    }
  }
  check(failed);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int linear(const Linear* l) {
  return out_of_memory([&] {
    if (l->geglu)
      run<true>(*l);
    else
      run<false>(*l);
  });
}

// A weight [N, K] as panels of columns [panel][K][width], see Weight; with a gate the first half of
// its rows, then the second. Columns past N, up to a whole line, are zero.
extern "C" __attribute__((visibility("default"))) void linear_pack(const float* weight,
                                                                   float* packed, int64_t outputs,
                                                                   int64_t inner, int32_t geglu,
                                                                   int32_t threads) {
  const Columns columns(outputs, geglu);
  const long panels = (columns.padded + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long i = 0; i < columns.parts * panels; ++i) {
    const long part = i / panels, panel = i % panels * kPanel;
    const long width = vectors_of(columns.padded - panel) * kLanes;
    const long real = std::clamp(columns.real - panel, 0L, width);
    const float* from = weight + (part * columns.real + panel) * inner;
    float* to = packed + (part * columns.padded + panel) * inner;
    for (long k = 0; k < inner; ++k, to += width) {
      for (long j = 0; j < real; ++j) to[j] = from[j * inner + k];
      std::fill(to + real, to + width, 0.f);
    }
  }
}
