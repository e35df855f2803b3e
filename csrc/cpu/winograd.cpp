// 3x3 convolutions by Winograd's F(2x2, 3x3) (Lavin & Gray 2015): 16 products in the place of 36,
//
//   Y = A^T [(G g G^T) . (B^T d B)] A
//
// for each tile d of 4x4 pixels, which gives 2x2 of the result. Tiles are taken in chunks: their
// transforms [16][tiles][C], 16 products with the weights' [16][C][O], and the transforms back.
// The weight's gradient is the same backwards, F(3x3, 2x2) with the result's gradient e of a tile:
//
//   sum over tiles of G^T [(B^T d B) . (A e A^T)] G
#include "winograd.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr int kPlanes = 16;
constexpr long kTiles = 32 * kTileRows;              // of a chunk
constexpr long kGradientTiles = 384;                 // the same for a weight's gradient
constexpr long kFewChannels = 64, kFewOutputs = 64;  // of a block of a weight's transform

// Planes of rows, with a line of the cache between: rows of a power of two would share its sets.
struct Planes {
  long row, plane;
  Memory memory;
  Planes(long rows, long columns)
      : row(rounded_up(columns, kLine) + kLine),
        plane(rows * row + kLine),
        memory(allocate(kPlanes * plane)) {}
  float* at(long k, long index) const { return memory.get() + k * plane + index * row; }
};

// Calls body(channel, lanes) for the vectors of a row.
template <class Body>
inline void along(long channels, Body body) {
  long c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, Full{});
  if (c < channels) body(c, Part{int(channels - c)});
}

// From one plane of a packed weight to the next: a line between, as above.
inline long plane_of_weight(long channels, long padded) { return channels * padded + kLine; }

struct Tile {
  long image, y, x;  // of its result
  template <class W>
  Tile(const W& w, long index) {
    const long rows = (w.out_height + 1) / 2, columns = (w.out_width + 1) / 2;
    image = index / (rows * columns);
    y = index / columns % rows * 2;
    x = index % columns * 2;
  }
};

template <class W>
long tiles_of(const W& w) {
  return w.batch * ((w.out_height + 1) / 2) * ((w.out_width + 1) / 2);
}

// B^T d B of a tile, to planes[k][index].
template <class W>
void transform(const W& w, const Tile& tile, const float* zeros, const Planes& planes, long index) {
  const float* pixels[4][4];
  for (long i = 0; i < 4; ++i)
    for (long j = 0; j < 4; ++j) {
      const long y = tile.y - w.top + i, x = tile.x - w.left + j;
      const bool inside = y >= 0 && y < w.height && x >= 0 && x < w.width;
      pixels[i][j] =
          inside ? w.x + ((tile.image * w.height + y) * w.width + x) * w.channels : zeros;
    }
  along(w.channels, [&](long c, auto lanes) {
    Vec t[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec d0 = load(pixels[0][j] + c, lanes), d1 = load(pixels[1][j] + c, lanes);
      const Vec d2 = load(pixels[2][j] + c, lanes), d3 = load(pixels[3][j] + c, lanes);
      t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec out[4] = {t[i][0] - t[i][2], t[i][1] + t[i][2], t[i][2] - t[i][1],
                          t[i][1] - t[i][3]};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(planes.at(4 * i + j, index) + c, out[j], lanes);
    }
  });
}

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef float Windows[9][kLanes];
constexpr long kWindows = 16;  // channels whose windows are gone over at once, along the memory

// Strides of a weight's outputs, channels and places in the window; a window read backwards has a
// negative one.
struct Strides {
  long output, channel, window;
};

// Those of `count` outputs, one in each lane, for `channels` channels; the other lanes are zero.
void read(const float* weight, const Strides& strides, long count, long channels, Windows* to) {
  std::memset(to, 0, channels * sizeof(Windows));
  if (strides.channel == 9 && strides.window == 1)  // one row of memory for each output
    return transpose(weight, strides.output, count, 9 * channels, to[0][0], kLanes);
  for (long lane = 0; lane < count; ++lane)
    for (long c = 0; c < channels; ++c)
      for (int n = 0; n < 9; ++n)
        to[c][n][lane] = weight[lane * strides.output + c * strides.channel + n * strides.window];
}

void write(const Windows* from, const Strides& strides, long count, long channels, float* weight) {
  if (strides.channel == 9 && strides.window == 1)
    return transpose(from[0][0], kLanes, 9 * channels, count, weight, strides.output);
  for (long lane = 0; lane < count; ++lane)
    for (long c = 0; c < channels; ++c)
      for (int n = 0; n < 9; ++n)
        weight[lane * strides.output + c * strides.channel + n * strides.window] = from[c][n][lane];
}

// G g G^T of a window in each lane, to 16 planes; in float64 until it is rounded.
void transform(const Windows& windows, float* to, long plane) {
  Doubles t[4][3];
  for (int n = 0; n < 3; ++n) {
    Doubles g[3];
    for (int m = 0; m < 3; ++m)
      g[m] = __builtin_convertvector(load(windows[3 * m + n], Full{}), Doubles);
    t[0][n] = g[0], t[1][n] = (g[0] + g[1] + g[2]) / 2, t[2][n] = (g[0] - g[1] + g[2]) / 2;
    t[3][n] = g[2];
  }
  for (int m = 0; m < 4; ++m) {
    const Doubles u0 = t[m][0], u1 = t[m][1], u2 = t[m][2];
    const Doubles out[4] = {u0, (u0 + u1 + u2) / 2, (u0 - u1 + u2) / 2, u2};
    for (int n = 0; n < 4; ++n)
      store(to + (4 * m + n) * plane, __builtin_convertvector(out[n], Vec), Full{});
  }
}

// G^T u G of 16 planes, a window in each lane.
void transform_back(const float* from, long plane, Windows& windows) {
  Vec t[3][4];
  for (int n = 0; n < 4; ++n) {
    Vec u[4];
    for (int m = 0; m < 4; ++m) u[m] = load(from + (4 * m + n) * plane, Full{});
    const Vec sum = (u[1] + u[2]) * all(0.5f);
    t[0][n] = u[0] + sum, t[1][n] = (u[1] - u[2]) * all(0.5f), t[2][n] = sum + u[3];
  }
  for (int m = 0; m < 3; ++m) {
    const Vec sum = (t[m][1] + t[m][2]) * all(0.5f);
    store(windows[3 * m], t[m][0] + sum, Full{});
    store(windows[3 * m + 1], (t[m][1] - t[m][2]) * all(0.5f), Full{});
    store(windows[3 * m + 2], sum + t[m][3], Full{});
  }
}

// Those of outputs [first, first + width) and `count` channels, as `width` columns of 16 planes.
void transform(const float* weight, const Strides& strides, long outputs, long first, long width,
               long count, float* to, long plane) {
  Windows windows[kWindows];
  for (long j = 0; j < width; j += kLanes) {
    const long real = std::clamp<long>(outputs - first - j, 0, kLanes);
    read(weight + (first + j) * strides.output, strides, real, count, windows);
    for (long c = 0; c < count; ++c) transform(windows[c], to + c * width + j, plane);
  }
}

// A^T M A of a tile with what follows it, for channels [begin, end) of the result, whose sums begin
// at `sums`.
void finish(const Winograd& w, const Tile& tile, const float* sums, long plane, long begin,
            long end) {
  const long place =
      ((tile.image * w.out_height + tile.y) * w.out_width + tile.x) * w.outputs + begin;
  const long rows = std::min(2L, w.out_height - tile.y),
             columns = std::min(2L, w.out_width - tile.x);
  const float* bias = w.bias ? w.bias + begin : nullptr;
  const float* add = w.add ? w.add + tile.image * w.add_stride + begin : nullptr;
  along(end - begin, [&](long c, auto lanes) {
    Vec t[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* m = sums + j * plane + c;
      const Vec m0 = load(m, Full{}), m1 = load(m + 4 * plane, Full{});
      const Vec m2 = load(m + 8 * plane, Full{}), m3 = load(m + 12 * plane, Full{});
      t[0][j] = m0 + m1 + m2, t[1][j] = m1 - m2 - m3;
    }
    Vec more = {};
    if (bias) more += load(bias + c, lanes);
    if (add) more += load(add + c, lanes);
    for (long i = 0; i < rows; ++i) {
      const Vec out[2] = {t[i][0] + t[i][1] + t[i][2], t[i][1] - t[i][2] - t[i][3]};
      for (long j = 0; j < columns; ++j) {
        const long at = place + (i * w.out_width + j) * w.outputs + c;
        Vec y = out[j] + more;
        if (w.residual) y += load(w.residual + at, lanes);
        store(w.y + at, y, lanes);
      }
    }
  });
}

// The transforms of tiles [first, first + count), and zeros up to a whole number of rows; a loop
// that all threads share.
void transform(const Winograd& w, long first, long count, const float* zeros,
               const Planes& values) {
#pragma omp for schedule(static)
  for (long i = 0; i < rounded_up(count, kTileRows); ++i)
    if (i < count)
      transform(w, Tile(w, first + i), zeros, values, i);
    else
      for (long k = 0; k < kPlanes; ++k) std::fill_n(values.at(k, i), values.row, 0.f);
}

void run(const Winograd& w, int threads) {
  const long tiles = tiles_of(w);
  const long chunk = rounded_up(std::min(tiles, kTiles), kTileRows);
  const long outputs = rounded_up(w.outputs, kLine), panels = (outputs + kPanel - 1) / kPanel;
  const long groups = std::clamp<long>((4L * w.threads + kPlanes - 1) / kPlanes, 1, panels);
  const long part = depth_of(w.channels);
  const std::vector<float> zeros(w.channels + kLanes);
  const Planes values(chunk, w.channels), sums(chunk, outputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (long first = 0; first < tiles; first += chunk) {
    const long count = std::min(chunk, tiles - first), rows = rounded_up(count, kTileRows);
    transform(w, first, count, zeros.data(), values);
#pragma omp for schedule(static)
    for (long unit = 0; unit < kPlanes * groups; ++unit) {
      const long k = unit / groups, group = unit % groups;
      const long begin = panels * group / groups * kPanel;
      const Weight weight{w.weight + k * plane_of_weight(w.channels, outputs), w.channels, outputs};
      for (long d = 0; d < w.channels; d += part)
        multiply({values.at(k, 0) + d, values.row}, weight, d, std::min(part, w.channels - d),
                 sums.at(k, 0) + begin, sums.row, rows, begin,
                 std::min(panels * (group + 1) / groups * kPanel, outputs), d > 0);
    }
#pragma omp for schedule(static)
    for (long i = 0; i < count; ++i)
      finish(w, Tile(w, first + i), sums.at(0, i), sums.plane, 0, w.outputs);
  }
}

// The same for few tiles of a weight that is not packed: blocks of its transform stay in the cache,
// and are used for all tiles at once.
void run_few(const Winograd& w, int threads) {
  const Strides strides{w.output, w.channel, w.window};
  const long tiles = tiles_of(w), rows = rounded_up(tiles, kTileRows);
  const long outputs = rounded_up(w.outputs, kLine);
  const std::vector<float> zeros(w.channels + kLanes);
  const Planes values(rows, w.channels);
  std::atomic<bool> failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Own<Planes> own_block(failed, kFewChannels, kFewOutputs), own(failed, rows, kFewOutputs);
#pragma omp barrier
    if (!failed) transform(w, 0, tiles, zeros.data(), values);
#pragma omp for schedule(dynamic)
    for (long begin = 0; begin < (failed ? 0 : outputs); begin += kFewOutputs) {
      const Planes &block = *own_block, &sums = *own;
      const long columns = std::min(kFewOutputs, outputs - begin);
      for (long d = 0; d < w.channels; d += kFewChannels) {
        const long depth = std::min(kFewChannels, w.channels - d);
        for (long panel = 0; panel < columns; panel += kPanel) {
          const long width = vectors_of(columns - panel) * kLanes;
          for (long c = 0; c < depth; c += kWindows)
            transform(w.weight + (d + c) * strides.channel, strides, w.outputs, begin + panel,
                      width, std::min(kWindows, depth - c),
                      block.at(0, 0) + panel * depth + c * width, block.plane);
        }
        for (long k = 0; k < kPlanes; ++k)
          multiply({values.at(k, 0) + d, values.row}, {block.at(k, 0), depth, columns}, 0, depth,
                   sums.at(k, 0), sums.row, rows, 0, columns, d > 0);
      }
      for (long i = 0; i < tiles; ++i)
        finish(w, Tile(w, i), sums.at(0, i), sums.plane, begin,
               std::min(begin + columns, long(w.outputs)));
    }
  }
  check(failed);
}

}  // namespace

// [16] times panels of columns [panel][C][width], a width being the vectors that the panel's
// columns take; columns past O, up to a whole line, are zero. A line lies between the planes.
extern "C" __attribute__((visibility("default"))) void winograd_pack(
    const float* weight, float* packed, int64_t outputs, int64_t channels, int64_t output,
    int64_t channel, int64_t window, int32_t threads) {
  const Strides strides{output, channel, window};
  const long padded = rounded_up(outputs, kLine), panels = (padded + kPanel - 1) / kPanel;
  const long blocks = (channels + kWindows - 1) / kWindows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long unit = 0; unit < panels * blocks; ++unit) {
    const long panel = unit / blocks * kPanel, begin = unit % blocks * kWindows;
    const long width = vectors_of(padded - panel) * kLanes;
    transform(weight + begin * channel, strides, outputs, panel, width,
              std::min(kWindows, long(channels) - begin), packed + panel * channels + begin * width,
              plane_of_weight(channels, padded));
  }
}

namespace {

void run(const Winograd& w) {
  const long tiles = tiles_of(w);
  const double work = double(tiles) * w.channels * w.outputs * kPlanes;
  const int threads = threads_for_products(work, w.threads);
  if (!w.window) return run(w, threads);
  if (tiles <= kTiles) return run_few(w, threads);
  const Memory packed =
      allocate(kPlanes * plane_of_weight(w.channels, rounded_up(w.outputs, kLine)));
  winograd_pack(w.weight, packed.get(), w.outputs, w.channels, w.output, w.channel, w.window,
                threads);
  Winograd of_packed = w;
  of_packed.weight = packed.get();
  run(of_packed, threads);
}

// A e A^T of the result's gradient in a tile, as row `index` of 16 weights of `columns` columns.
void transform(const WinogradGradient& w, const Tile& tile, const float* zeros, float* planes,
               long plane, long columns, long chunk, long index) {
  const float* pixels[2][2];
  for (long i = 0; i < 2; ++i)
    for (long j = 0; j < 2; ++j) {
      const long y = tile.y + i, x = tile.x + j;
      const bool inside = y < w.out_height && x < w.out_width;
      pixels[i][j] =
          inside ? w.grad + ((tile.image * w.out_height + y) * w.out_width + x) * w.outputs : zeros;
    }
  along(w.outputs, [&](long o, auto lanes) {
    const long panel = o / kPanel * kPanel, width = vectors_of(columns - panel) * kLanes;
    float* to = planes + panel * chunk + index * width + o - panel;
    Vec t[4][2];
    for (int j = 0; j < 2; ++j) {
      const Vec e0 = load(pixels[0][j] + o, lanes), e1 = load(pixels[1][j] + o, lanes);
      t[0][j] = e0, t[1][j] = e0 + e1, t[2][j] = e0 - e1, t[3][j] = -e1;
    }
    for (int i = 0; i < 4; ++i) {
      const Vec out[4] = {t[i][0], t[i][0] + t[i][1], t[i][0] - t[i][1], -t[i][1]};
      for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * plane, out[j], Full{});
    }
  });
}

void run(const WinogradGradient& w) {
  const long tiles = tiles_of(w), chunk = std::min(tiles, kGradientTiles);
  const long outputs = rounded_up(w.outputs, kLanes), panels = (outputs + kPanel - 1) / kPanel;
  const long groups = std::clamp<long>((4L * w.threads + kPlanes - 1) / kPlanes, 1, panels);
  const long plane = chunk * outputs + kLine;
  const double work = double(tiles) * w.channels * w.outputs * kPlanes;
  const int threads = threads_for_products(work, w.threads);
  const std::vector<float> zeros(std::max(w.channels, w.outputs) + kLanes);
  const Planes values(chunk, w.channels), sums(w.channels, outputs);
  const Memory grads = allocate(kPlanes * plane);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (long first = 0; first < tiles; first += chunk) {
      const long count = std::min(chunk, tiles - first), part = depth_of(count);
#pragma omp for schedule(static)
      for (long i = 0; i < count; ++i) {
        const Tile tile(w, first + i);
        transform(w, tile, zeros.data(), values, i);
        transform(w, tile, zeros.data(), grads.get(), plane, outputs, chunk, i);
      }
#pragma omp for schedule(static)
      for (long unit = 0; unit < kPlanes * groups; ++unit) {
        const long k = unit / groups, group = unit % groups;
        const long begin = panels * group / groups * kPanel;
        const Weight weight{grads.get() + k * plane, chunk, outputs};
        for (long d = 0; d < count; d += part)
          multiply({values.at(k, d), 1, values.row}, weight, d, std::min(part, count - d),
                   sums.at(k, 0) + begin, sums.row, w.channels, begin,
                   std::min(panels * (group + 1) / groups * kPanel, outputs), first + d > 0);
      }
    }
    const Strides strides{w.output, w.channel, w.window};
    const long blocks = (w.channels + kWindows - 1) / kWindows;
#pragma omp for schedule(static)
    for (long unit = 0; unit < outputs / kLanes * blocks; ++unit) {
      const long output = unit / blocks * kLanes, begin = unit % blocks * kWindows;
      const long count = std::min(kWindows, w.channels - begin);
      Windows windows[kWindows];
      for (long c = 0; c < count; ++c)
        transform_back(sums.at(0, begin + c) + output, sums.plane, windows[c]);
      write(windows, strides, std::min<long>(kLanes, w.outputs - output), count,
            w.weight + output * w.output + begin * w.channel);
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int winograd(const Winograd* w) {
  return out_of_memory([&] { run(*w); });
}

extern "C" __attribute__((visibility("default"))) int winograd_gradient(const WinogradGradient* w) {
  return out_of_memory([&] { run(*w); });
}
