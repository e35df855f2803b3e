// first half * gelu(second half) of each row, and its gradient: each number is read once.
#include "geglu.h"

#include "threads.h"
#include "vector.h"

namespace {

constexpr float kDensity = 0.398942280f;  // 1 / sqrt(2 pi)

template <class T, class Lanes>
void forward(const T* value, const T* gate, T* out, Lanes lanes) {
  store(out, load(value, lanes) * gelu(load(gate, lanes)), lanes);
}

// gelu'(g) = Phi(g) + g phi(g), with the normal distribution's Phi and phi.
template <class T, class Lanes>
void backward(const T* value, const T* gate, const T* grad, T* out, long columns, Lanes lanes) {
  const Vec g = load(gate, lanes), dy = load(grad, lanes), cdf = normal_cdf(g);
  const Vec density = kDensity * exponential(-0.5f * g * g);
  store(out, dy * (g * cdf), lanes);
  store(out + columns, dy * load(value, lanes) * (cdf + g * density), lanes);
}

template <class T>
void run(const Geglu& g) {
  const int threads = threads_for_elements(g.rows * g.columns, g.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long row = 0; row < g.rows; ++row) {
    const T* value = (const T*)g.x + 2 * row * g.columns;
    const T* grad = (const T*)g.grad + row * g.columns;
    T* out = (T*)g.out + (g.grad ? 2 : 1) * row * g.columns;
    auto vector = [&](long c, auto lanes) {
      const T* gate = value + g.columns + c;
      if (g.grad)
        backward(value + c, gate, grad + c, out + c, g.columns, lanes);
      else
        forward(value + c, gate, out + c, lanes);
    };
    long c = 0;
    for (; c + kLanes <= g.columns; c += kLanes) vector(c, Full{});
    if (c < g.columns) vector(c, Part{int(g.columns - c)});
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void geglu(const Geglu* g) {
  if (g->dtype == 0) run<float>(*g);
  if (g->dtype == 1) run<BFloat16>(*g);
  if (g->dtype == 2) run<Float16>(*g);
}
