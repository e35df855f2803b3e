// 3x3 convolutions by Winograd's F(2x2, 3x3) (Lavin & Gray 2015): 16 products in the place of 36,
//
//   Y = A^T [(G g G^T) . (B^T d B)] A
//
// for each tile d of 4x4 pixels, which gives 2x2 of the result. Tiles are taken in chunks: their
// transforms [16][tiles][C], 16 products with the weights' [16][C][O], and the transforms back.
#include "winograd.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr int kPlanes = 16;
constexpr long kTiles = 32 * kTileRows;  // of a chunk

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

struct Tile {
  long image, y, x;  // of its result
  Tile(const Winograd& w, long index) {
    const long rows = (w.out_height + 1) / 2, columns = (w.out_width + 1) / 2;
    image = index / (rows * columns);
    y = index / columns % rows * 2;
    x = index % columns * 2;
  }
};

// B^T d B of a tile, to planes[k][index].
void transform(const Winograd& w, const Tile& tile, const float* zeros, const Planes& planes,
               long index) {
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

// A^T M A of a tile with what follows it, to the result.
void finish(const Winograd& w, const Tile& tile, const Planes& planes, long index) {
  const long place = ((tile.image * w.out_height + tile.y) * w.out_width + tile.x) * w.outputs;
  const long rows = std::min(2L, w.out_height - tile.y),
             columns = std::min(2L, w.out_width - tile.x);
  const float* add = w.add ? w.add + tile.image * w.add_stride : nullptr;
  along(w.outputs, [&](long c, auto lanes) {
    Vec t[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec m0 = load(planes.at(j, index) + c, Full{}),
                m1 = load(planes.at(4 + j, index) + c, Full{});
      const Vec m2 = load(planes.at(8 + j, index) + c, Full{}),
                m3 = load(planes.at(12 + j, index) + c, Full{});
      t[0][j] = m0 + m1 + m2, t[1][j] = m1 - m2 - m3;
    }
    Vec more = {};
    if (w.bias) more += load(w.bias + c, lanes);
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

void run(const Winograd& w) {
  const long tiles = w.batch * ((w.out_height + 1) / 2) * ((w.out_width + 1) / 2);
  const long chunk = rounded_up(std::min(tiles, kTiles), kTileRows);
  const long outputs = rounded_up(w.outputs, kLine), panels = (outputs + kPanel - 1) / kPanel;
  const long groups = std::clamp<long>((4L * w.threads + kPlanes - 1) / kPlanes, 1, panels);
  const long part = depth_of(w.channels);
  const double work = double(tiles) * w.channels * w.outputs * kPlanes;
  const int threads = threads_for_products(work, w.threads);
  const std::vector<float> zeros(w.channels + kLanes);
  const Planes values(chunk, w.channels), sums(chunk, outputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (long first = 0; first < tiles; first += chunk) {
    const long count = std::min(chunk, tiles - first), rows = rounded_up(count, kTileRows);
#pragma omp for schedule(static)
    for (long i = 0; i < rows; ++i)
      if (i < count)
        transform(w, Tile(w, first + i), zeros.data(), values, i);
      else
        for (long k = 0; k < kPlanes; ++k) std::fill_n(values.at(k, i), values.row, 0.f);
#pragma omp for schedule(static)
    for (long unit = 0; unit < kPlanes * groups; ++unit) {
      const long k = unit / groups, group = unit % groups;
      const long begin = panels * group / groups * kPanel;
      const Weight weight{w.weight + k * w.channels * outputs, w.channels, outputs};
      for (long d = 0; d < w.channels; d += part)
        multiply(values.at(k, 0) + d, values.row, weight, d, std::min(part, w.channels - d),
                 sums.at(k, 0) + begin, sums.row, rows, begin,
                 std::min(panels * (group + 1) / groups * kPanel, outputs));
    }
#pragma omp for schedule(static)
    for (long i = 0; i < count; ++i) finish(w, Tile(w, first + i), sums, i);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void winograd(const Winograd* w) { run(*w); }

namespace {

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef float Windows[9][kLanes];
constexpr long kWindows = 8;  // channels whose windows are read at once, along the memory

// Those of `count` outputs, one in each lane, for channels [begin, end); the other lanes are zero.
void read(const float* weight, long channels, long count, long begin, long end, Windows* to) {
  std::memset(to, 0, (end - begin) * sizeof(Windows));
  for (long lane = 0; lane < count; ++lane)
    for (long c = begin; c < end; ++c)
      for (int n = 0; n < 9; ++n) to[c - begin][n][lane] = weight[(lane * channels + c) * 9 + n];
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

}  // namespace

// [16] times panels of columns [panel][C][width], a width being the vectors that the panel's
// columns take; columns past O, up to a whole line, are zero.
extern "C" __attribute__((visibility("default"))) void winograd_pack(const float* weight,
                                                                     float* packed, int64_t outputs,
                                                                     int64_t channels,
                                                                     int32_t threads) {
  const long padded = rounded_up(outputs, kLine), panels = (padded + kPanel - 1) / kPanel;
  const long blocks = (channels + kWindows - 1) / kWindows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long unit = 0; unit < panels * blocks; ++unit) {
    const long panel = unit / blocks * kPanel, begin = unit % blocks * kWindows;
    const long end = std::min(begin + kWindows, long(channels));
    const long width = vectors_of(padded - panel) * kLanes;
    float* to = packed + panel * channels;
    Windows windows[kWindows];
    for (long j = 0; j < width; j += kLanes) {
      const long output = panel + j, count = std::min<long>(kLanes, outputs - output);
      read(weight + output * channels * 9, channels, count, begin, end, windows);
      for (long c = begin; c < end; ++c)
        transform(windows[c - begin], to + c * width + j, channels * padded);
    }
  }
}
