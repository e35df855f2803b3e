// GroupNorm with its neighbours in a U-Net, forward and backward, in float32 arithmetic:
//
//   u = (x + add - mean) rstd,  p = u weight + bias,  z = p (1 + scale) + shift,  y = z sigmoid(z)
//
// Statistics are of each channel, by two passes over pieces that stay in the cache; pieces are put
// together in float64 (Chan, Golub & LeVeque 1983). What the mean loses by rounding to float32 is
// added back behind the difference, so that a mean far from zero costs no digits.
#include "group_norm.h"

#include <cmath>
#include <vector>

#include "buffer.h"
#include "threads.h"
#include "walk.h"

namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

// One of the two inputs: the channels [first, first + C) of the norm.
template <class T>
struct Source {
  const T* x;
  T* dx;
  Shape shape;
  long first;
};

template <class T>
std::vector<Source<T>> sources(const GroupNorm& n) {
  const bool last = n.last != 0;
  std::vector<Source<T>> found;
  found.push_back({(const T*)n.x, (T*)n.dx, {last, n.channels, n.pixels}, 0});
  if (n.x2) found.push_back({(const T*)n.x2, (T*)n.dx2, {last, n.channels2, n.pixels}, n.channels});
  return found;
}

// Runs body(image, range) for all units of all images.
template <class Body>
void for_units(const GroupNorm& n, const Shape& shape, Body body) {
  const Split split(shape);
  const long units = split.units(), total = n.batch * units;
  const int threads = threads_for_elements(n.batch * shape.size(), n.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long unit = 0; unit < total; ++unit)
    body(unit / units, range_of(shape, split, unit % units));
}

// mean and sum of squared deviations of each channel, [B, C].
template <class T>
void moments(const GroupNorm& n, const Source<T>& source, double* mean, double* squares) {
  const Shape shape = source.shape;
  const long channels = shape.channels, all_channels = n.channels + n.channels2;
  const Split split(shape);
  Doubles means(n.batch * split.parts * channels), deviations(means.size());
  for_units(n, shape, [&](long image, const Range& r) {
    const T* x = source.x + image * shape.size();
    const Place at(shape);
    Floats buffer(3 * channels);
    float *center = buffer.data(), *rest = center + channels, *squared = rest + channels;
    double* m = means.data() + (image * split.parts + r.part) * channels;
    double* d = deviations.data() + (image * split.parts + r.part) * channels;
    for (long p = r.p0; p < r.p1; p += split.chunk) {
      const long end = std::min(p + split.chunk, r.p1);
      const float count = end - p;
      for (float* zero : {center, rest, squared}) std::fill(zero + r.c0, zero + r.c1, 0.f);
      const Range piece{r.c0, r.c1, p, end, 0};
      walk<0, 1>(shape.last, piece, nullptr, &center,
                 [&](const Vec*, Vec* sums, long c, long p, auto lanes) {
                   sums[0] += load(x + at(c, p), lanes);
                 });
      for (long c = r.c0; c < r.c1; ++c) center[c] /= count;
      float* sums[2] = {rest, squared};
      walk<1, 2>(shape.last, piece, &center, sums,
                 [&](const Vec* known, Vec* sums, long c, long p, auto lanes) {
                   const Vec deviation = load(x + at(c, p), lanes) - known[0];
                   sums[0] += deviation;
                   sums[1] += deviation * deviation;
                 });
      const double before = p - r.p0, share = count / (before + count);
      for (long c = r.c0; c < r.c1; ++c) {
        const double offset = double(rest[c]) / count, other = center[c] + offset;
        const double delta = other - m[c];
        d[c] += squared[c] - offset * rest[c] + delta * delta * before * share;
        m[c] += delta * share;
      }
    }
  });
  for (long image = 0; image < n.batch; ++image) {
    double* to_mean = mean + image * all_channels + source.first;
    double* to_squares = squares + image * all_channels + source.first;
    double before = 0;
    for (long part = 0; part < split.parts; ++part) {
      const double count =
          shape.pixels * (part + 1) / split.parts - shape.pixels * part / split.parts;
      const double share = count / (before + count);
      const double* m = means.data() + (image * split.parts + part) * channels;
      const double* d = deviations.data() + (image * split.parts + part) * channels;
      for (long c = 0; c < channels; ++c) {
        const double delta = m[c] - to_mean[c];
        to_squares[c] += d[c] + delta * delta * before * share;
        to_mean[c] += delta * share;
      }
      before += count;
    }
  }
}

inline float of(const float* rows, long stride, long image, long channel) {
  return rows[image * stride + channel];
}

// What each channel of each image needs, [B, C] each: u = (x - center) rstd + rest, and
// z = u slope + level.
struct Channels {
  Floats center, rstd, rest, slope, level;
  Doubles offset;  // of the channel's own mean: the sum of its u is pixels * rstd * offset
};

template <class T>
Channels channels_of(const GroupNorm& n) {
  const long channels = n.channels + n.channels2, size = n.batch * channels;
  Doubles mean(size), squares(size);
  for (const auto& source : sources<T>(n)) moments(n, source, mean.data(), squares.data());
  Channels k;
  for (Floats* one : {&k.center, &k.rstd, &k.rest, &k.slope, &k.level}) one->resize(size);
  k.offset.resize(size);
  const long width = channels / n.groups;
  for (long image = 0; image < n.batch; ++image)
    for (long group = 0; group < n.groups; ++group) {
      const long begin = group * width, end = begin + width;
      double* m = mean.data() + image * channels;
      const double* d = squares.data() + image * channels;
      double middle = 0, variance = 0;
      for (long c = begin; c < end; ++c)
        middle += m[c] + (n.add ? of(n.add, n.add_stride, image, c) : 0);
      middle /= width;
      for (long c = begin; c < end; ++c) {
        const double delta = m[c] + (n.add ? of(n.add, n.add_stride, image, c) : 0) - middle;
        variance += d[c] + n.pixels * delta * delta;
      }
      variance /= double(width) * n.pixels;
      const double rstd = 1 / std::sqrt(variance + n.eps);
      for (long c = begin; c < end; ++c) {
        const long i = image * channels + c;
        const double center = middle - (n.add ? of(n.add, n.add_stride, image, c) : 0);
        const double factor = n.scale ? 1.0 + of(n.scale, n.scale_stride, image, c) : 1.0;
        k.center[i] = center;
        k.rstd[i] = rstd;
        k.rest[i] = (k.center[i] - center) * rstd;
        k.slope[i] = n.weight[c] * factor;
        k.level[i] = n.bias[c] * factor + (n.shift ? of(n.shift, n.shift_stride, image, c) : 0);
        k.offset[i] = m[c] - center;
      }
    }
  return k;
}

template <class T>
void forward(const GroupNorm& n) {
  const Shape whole{n.last != 0, n.channels + n.channels2, n.pixels};
  Channels k = channels_of<T>(n);
  for (size_t i = 0; i < k.level.size(); ++i) {  // y = (x - center) slope + level
    k.level[i] += k.rest[i] * k.slope[i];
    k.slope[i] *= k.rstd[i];
  }
  for (const auto& source : sources<T>(n))
    for_units(n, source.shape, [&](long image, const Range& range) {
      const T* x = source.x + image * source.shape.size();
      T* y = (T*)n.y + image * whole.size();
      const Place at(source.shape), to(whole, source.first);
      const long row = image * whole.channels + source.first;
      const float* numbers[3] = {&k.center[row], &k.slope[row], &k.level[row]};
      auto write = [&](auto activation) {
        walk<3, 0>(whole.last, range, numbers, nullptr,
                   [&](const Vec* known, Vec*, long c, long p, auto lanes) {
                     const Vec z = (load(x + at(c, p), lanes) - known[0]) * known[1] + known[2];
                     store(y + to(c, p), activation(z), lanes);
                   });
      };
      if (n.silu)
        write([](Vec z) { return z * sigmoid(z); });
      else
        write([](Vec z) { return z; });
    });
}

// The gradient of z from that of y.
template <bool kSilu>
inline Vec before_silu(Vec grad, Vec z) {
  if (!kSilu) return grad;
  const Vec s = sigmoid(z);
  return grad * s * (1 + z * (1 - s));
}

// Sums over the pixels of each channel, [B, C] each: of dz, and of dz u.
struct Sums {
  Doubles dz, dzu;
};

template <bool kSilu, class T>
void add_up(const GroupNorm& n, const Source<T>& source, const Channels& k, Sums& result) {
  const Shape shape = source.shape, whole{n.last != 0, n.channels + n.channels2, n.pixels};
  const Split split(shape);
  Doubles parts(2 * n.batch * split.parts * shape.channels);
  for_units(n, shape, [&](long image, const Range& r) {
    const T* x = source.x + image * shape.size();
    const T* grad = (const T*)n.grad + image * whole.size();
    const Place at(shape), from(whole, source.first);
    const long row = image * whole.channels + source.first;
    const float* numbers[5] = {&k.center[row], &k.rstd[row], &k.rest[row], &k.slope[row],
                               &k.level[row]};
    Floats buffer(2 * shape.channels);
    float* sums[2] = {buffer.data(), buffer.data() + shape.channels};
    double* to = parts.data() + 2 * (image * split.parts + r.part) * shape.channels;
    for (long p = r.p0; p < r.p1; p += split.chunk) {
      for (float* zero : sums) std::fill(zero + r.c0, zero + r.c1, 0.f);
      walk<5, 2>(shape.last, {r.c0, r.c1, p, std::min(p + split.chunk, r.p1), 0}, numbers, sums,
                 [&](const Vec* known, Vec* sums, long c, long p, auto lanes) {
                   const Vec u = (load(x + at(c, p), lanes) - known[0]) * known[1] + known[2];
                   const Vec dz =
                       before_silu<kSilu>(load(grad + from(c, p), lanes), u * known[3] + known[4]);
                   sums[0] += dz;
                   sums[1] += dz * u;
                 });
      for (long c = r.c0; c < r.c1; ++c) {
        to[2 * c] += sums[0][c];
        to[2 * c + 1] += sums[1][c];
      }
    }
  });
  for (long image = 0; image < n.batch; ++image)
    for (long part = 0; part < split.parts; ++part) {
      const double* from = parts.data() + 2 * (image * split.parts + part) * shape.channels;
      const long row = image * whole.channels + source.first;
      for (long c = 0; c < shape.channels; ++c) {
        result.dz[row + c] += from[2 * c];
        result.dzu[row + c] += from[2 * c + 1];
      }
    }
}

// dx = dz first + u second + third.
struct Slopes {
  Floats first, second, third;
};

// The gradients of all but x, and what that of x takes.
Slopes finish(const GroupNorm& n, const Channels& k, const Sums& sums) {
  const long channels = n.channels + n.channels2, width = channels / n.groups;
  Slopes slopes;
  for (Floats* one : {&slopes.first, &slopes.second, &slopes.third}) one->resize(sums.dz.size());
  Doubles dweight(channels), dbias(channels);
  for (long i = 0; i < n.batch * channels; ++i) {
    const long image = i / channels, c = i % channels;
    const double factor = n.scale ? 1.0 + of(n.scale, n.scale_stride, image, c) : 1.0;
    dweight[c] += factor * sums.dzu[i];
    dbias[c] += factor * sums.dz[i];
    if (n.dscale) n.dscale[i] = n.weight[c] * sums.dzu[i] + n.bias[c] * sums.dz[i];
    if (n.dshift) n.dshift[i] = sums.dz[i];
  }
  std::copy(dweight.begin(), dweight.end(), n.dweight);
  std::copy(dbias.begin(), dbias.end(), n.dbias);
  for (long image = 0; image < n.batch; ++image)
    for (long group = 0; group < n.groups; ++group) {
      const long begin = image * channels + group * width, end = begin + width;
      double du = 0, duu = 0;
      for (long i = begin; i < end; ++i) {
        du += k.slope[i] * sums.dz[i];
        duu += k.slope[i] * sums.dzu[i];
      }
      du /= double(width) * n.pixels;
      duu /= double(width) * n.pixels;
      for (long i = begin; i < end; ++i) {
        const double rstd = k.rstd[i], u = n.pixels * rstd * k.offset[i];
        slopes.first[i] = rstd * k.slope[i];
        slopes.second[i] = -rstd * duu;
        slopes.third[i] = -rstd * du;
        if (n.dadd) n.dadd[i] = rstd * (k.slope[i] * sums.dz[i] - n.pixels * du - duu * u);
      }
    }
  return slopes;
}

template <bool kSilu, class T>
void backward(const GroupNorm& n) {
  const Shape whole{n.last != 0, n.channels + n.channels2, n.pixels};
  const Channels k = channels_of<T>(n);
  Sums sums{Doubles(k.center.size()), Doubles(k.center.size())};
  for (const auto& source : sources<T>(n)) add_up<kSilu>(n, source, k, sums);
  const Slopes slopes = finish(n, k, sums);
  for (const auto& source : sources<T>(n))
    for_units(n, source.shape, [&](long image, const Range& range) {
      const T* x = source.x + image * source.shape.size();
      T* dx = source.dx + image * source.shape.size();
      const T* grad = (const T*)n.grad + image * whole.size();
      const Place at(source.shape), from(whole, source.first);
      const long row = image * whole.channels + source.first;
      const float* numbers[8] = {&k.center[row],      &k.rstd[row],      &k.rest[row],
                                 &k.slope[row],       &k.level[row],     &slopes.first[row],
                                 &slopes.second[row], &slopes.third[row]};
      walk<8, 0>(whole.last, range, numbers, nullptr,
                 [&](const Vec* known, Vec*, long c, long p, auto lanes) {
                   const Vec u = (load(x + at(c, p), lanes) - known[0]) * known[1] + known[2];
                   const Vec dz =
                       before_silu<kSilu>(load(grad + from(c, p), lanes), u * known[3] + known[4]);
                   store(dx + at(c, p), dz * known[5] + u * known[6] + known[7], lanes);
                 });
    });
}

template <class T>
void run(const GroupNorm& n) {
  if (!n.grad) return forward<T>(n);
  n.silu ? backward<true, T>(n) : backward<false, T>(n);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int group_norm_silu(const GroupNorm* n) {
  return out_of_memory([&] {
    if (n->dtype == 0) run<float>(*n);
    if (n->dtype == 1) run<BFloat16>(*n);
    if (n->dtype == 2) run<Float16>(*n);
  });
}
