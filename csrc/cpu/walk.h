// Walks over an image whose channels or pixels are innermost, with numbers that belong to channels.
#pragma once

#include <algorithm>

#include "vector.h"

namespace {

// An image in memory: C channels of S pixels, channels innermost (channels_last) or pixels.
struct Shape {
  bool last;
  long channels, pixels;
  long size() const { return channels * pixels; }
};

// Where the elements of an image lie; as a part of a wider image where they begin at a channel of
// it.
struct Place {
  long by_channel, by_pixel, begin;
  explicit Place(const Shape& whole, long first = 0)
      : by_channel(whole.last ? 1 : whole.pixels),
        by_pixel(whole.last ? whole.channels : 1),
        begin(first * by_channel) {}
  long operator()(long channel, long pixel) const {
    return begin + channel * by_channel + pixel * by_pixel;
  }
};

constexpr int kRows = 4;  // pixels that share the loads of what belongs to their channels

struct Range {
  long c0, c1, p0, p1, part;
};

// Calls body(numbers, sums, channel, pixel, lanes) for vectors of elements that begin there, over a
// range of an image. numbers[k] holds numbers[k][channel], and what the body adds to sums[a] ends
// in sums[a][channel].
template <int kNumbers, int kSums, class Body>
inline void walk(bool last, const Range& range, const float* const* numbers, float* const* sums,
                 Body body) {
  const auto [c0, c1, p0, p1, part] = range;
  Vec known[kNumbers + 1], added[kSums + 1];
  if (!last) {
    for (long c = c0; c < c1; ++c) {
      for (int k = 0; k < kNumbers; ++k) known[k] = all(numbers[k][c]);
      for (int a = 0; a < kSums; ++a) added[a] = Vec{};
      long p = p0;
      for (; p + kLanes <= p1; p += kLanes) body(known, added, c, p, Full{});
      if (p < p1) {
        Vec before[kSums + 1];
        for (int a = 0; a < kSums; ++a) before[a] = added[a];
        const Part rest{int(p1 - p)};
        body(known, added, c, p, rest);
        for (int a = 0; a < kSums; ++a) added[a] = within(added[a], before[a], rest);
      }
      for (int a = 0; a < kSums; ++a) sums[a][c] += sum(added[a]);
    }
    return;
  }
  auto column = [&](long p, long rows, long c, auto lanes) {
    for (int k = 0; k < kNumbers; ++k) known[k] = load(numbers[k] + c, lanes);
    for (int a = 0; a < kSums; ++a) added[a] = load(sums[a] + c, lanes);
    for (long row = 0; row < rows; ++row) body(known, added, c, p + row, lanes);
    for (int a = 0; a < kSums; ++a) store(sums[a] + c, added[a], lanes);
  };
  for (long p = p0; p < p1; p += kRows) {
    const long rows = std::min<long>(kRows, p1 - p);
    long c = c0;
    for (; c + kLanes <= c1; c += kLanes) column(p, rows, c, Full{});
    if (c < c1) column(p, rows, c, Part{int(c1 - c)});
  }
}

// How the pixels of an image are shared out, whatever the number of threads: sums have one order.
struct Split {
  long parts;   // of the pixels
  long ranges;  // of the channels
  long chunk;   // pixels whose sums are made in float32, before they are added up in float64

  explicit Split(const Shape& shape) {
    parts = shape.last ? std::clamp(shape.size() / 32768, 1L, 64L) : 1;
    ranges = shape.last ? 1 : std::clamp(shape.size() / 32768, 1L, shape.channels);
    chunk = shape.last ? 128 : 2048;
  }
  long units() const { return parts * ranges; }
};

inline Range range_of(const Shape& shape, const Split& split, long unit) {
  const long part = unit / split.ranges, range = unit % split.ranges;
  return {shape.channels * range / split.ranges, shape.channels * (range + 1) / split.ranges,
          shape.pixels * part / split.parts, shape.pixels * (part + 1) / split.parts, part};
}

}  // namespace
