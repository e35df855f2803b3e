// Vectors of float32 as wide as the instructions that this file is compiled for, and the numbers in
// memory that they are loaded from: float32, bfloat16, float16. All arithmetic is in float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline long rounded_up(long value, long to) { return (value + to - 1) / to * to; }

// How many lanes of a vector lie in memory: all of them, or the first ones.
struct Full {};
struct Part {
  int lanes;
};

inline Vec all(float value) {
#ifdef __AVX512F__
  return _mm512_set1_ps(value);
#else
  return _mm256_set1_ps(value);
#endif
}

template <class To, class From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

template <class V, class T>
inline V load_as(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline Vec load(const float* from, Full) { return load_as<Vec>(from); }

inline Vec load(const BFloat16* from, Full) {
  return bits_of<Vec>(__builtin_convertvector(load_as<Halves>(from), Bits) << 16);
}

inline Vec load(const Float16* from, Full) {
#ifdef __AVX512F__
  return _mm512_cvtph_ps(load_as<__m256i>(from));
#else
  return _mm256_cvtph_ps(load_as<__m128i>(from));
#endif
}

// Lanes past the part are zero.
template <class T>
inline Vec load(const T* from, Part part) {
  T whole[kLanes] = {};
  std::memcpy(whole, from, part.lanes * sizeof(T));
  return load(whole, Full{});
}

inline void store(float* to, Vec value, Full) { std::memcpy(to, &value, sizeof(value)); }

// Rounded to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* to, Vec value, Full) {
  const Bits bits = bits_of<Bits>(value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits kept = value == value ? rounded : (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

inline void store(Float16* to, Vec value, Full) {
#ifdef __AVX512F__
  const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#endif
  std::memcpy(to, &halves, sizeof(halves));
}

template <class T>
inline void store(T* to, Vec value, Part part) {
  T whole[kLanes];
  store(whole, value, Full{});
  std::memcpy(to, whole, part.lanes * sizeof(T));
}

// `value` in the lanes of a part, `other` in those past it.
inline Vec within(Vec value, Vec other, Part part) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < part.lanes ? value : other;
}

// In a fixed order: halves, quarters, ...
inline float sum(Vec value) {
  float lanes[kLanes];
  store(lanes, value, Full{});
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The larger and the smaller of two; the second of them where one is a NaN.
inline Vec larger(Vec a, Vec b) {
#ifdef __AVX512F__
  return _mm512_max_ps(a, b);
#else
  return _mm256_max_ps(a, b);
#endif
}
inline Vec smaller(Vec a, Vec b) {
#ifdef __AVX512F__
  return _mm512_min_ps(a, b);
#else
  return _mm256_min_ps(a, b);
#endif
}

// Whether all lanes are equal; a NaN is to nothing.
inline bool same(Vec a, Vec b) {
#ifdef __AVX512F__
  return !_mm512_cmpneq_ps_mask(a, b);
#else
  return !_mm256_movemask_ps(a != b);
#endif
}

inline Vec at_least(Vec value, float limit) { return larger(all(limit), value); }
inline Vec at_most(Vec value, float limit) { return smaller(all(limit), value); }

// e^x to about one unit in the last place; 0 below the smallest normal number, NaN for NaN.
// With n = round(x / ln 2) and r = x - n ln 2: e^x = 2^n (1 + r + r^2 P(r)), P fitted to 3e-9.
inline Vec exponential(Vec x) {
  constexpr float kMagic = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec bounded = at_most(at_least(x, -87.3f), 88.3f);
  const Vec shifted = bounded * 1.44269504f + kMagic;
  const Vec n = shifted - kMagic;
  const Vec r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = all(1.381314278e-03f);
  p = p * r + 8.369419487e-03f;
  p = p * r + 4.166845686e-02f;
  p = p * r + 1.666651479e-01f;
  p = p * r + 4.999999305e-01f;
  p = p * (r * r) + r + 1;
  const Vec power = bits_of<Vec>((bits_of<Ints>(shifted) + 127) << 23);
  return x < -87.3f ? Vec{} : p * power;
}

// 2^x for x below 128, to about one unit in the last place; 0 below the smallest normal number, NaN
// for NaN. 2^x = 2^n (1 + r P(r)) with n = round(x) and r = x - n, P fitted to 2e-9.
inline Vec power_of_two(Vec x) {
  constexpr float kMagic = 12582912 + 127;  // 1.5 * 2^23: adding it rounds to an integer, and n's
  const Vec bounded = at_least(x, -127);    // exponent is in the lowest bits
  const Vec shifted = bounded + kMagic, r = bounded - (shifted - kMagic);
  Vec p = all(1.535334967e-04f);
  p = p * r + 1.339887524e-03f;
  p = p * r + 9.618437413e-03f;
  p = p * r + 5.550332469e-02f;
  p = p * r + 2.402264791e-01f;
  p = p * r + 6.931472029e-01f;
  return (p * r + 1) * bits_of<Vec>(bits_of<Ints>(shifted) << 23);
}

// The same to 8e-5; 0 below the smallest normal number. P is fitted on [-1/2, 1/2] to the least
// relative error.
inline Vec about_power_of_two(Vec x) {
  constexpr float kMagic = 12582912 + 127;
  const Vec bounded = at_least(x, -127);
  const Vec shifted = bounded + kMagic, r = bounded - (shifted - kMagic);
  Vec p = all(0.05517167f);
  p = p * r + 0.24261112f;
  p = p * r + 0.69326099f;
  p = p * r + 0.99992807f;
  return p * bits_of<Vec>(bits_of<Ints>(shifted) << 23);
}

// The normal distribution's Phi(x), with Phi(-z sqrt 2) = erfc(z) / 2 = t P(t) e^(-z^2) and
// t = 1 / (1 + 0.4 z), for z >= 0; P fitted to 7e-9 of erfc(z) e^(z^2).
inline Vec normal_cdf(Vec x) {
  const Vec z = (x < 0 ? -x : x) * 0.707106781f, t = 1 / (1 + 0.4f * z);
  Vec p = all(-3.059723907e-02f);
  p = p * t + 2.034850999e-01f;
  p = p * t - 5.117454000e-01f;
  p = p * t + 5.647847216e-01f;
  p = p * t - 2.988913815e-01f;
  p = p * t + 2.799206560e-01f;
  p = p * t + 1.269415050e-01f;
  p = p * t + 2.155114027e-01f;
  p = p * t + 2.248799832e-01f;
  p = p * t + 2.257106588e-01f;
  const Vec tail = 0.5f * (p * t) * exponential(-z * z);
  return x < 0 ? tail : 1 - tail;
}

inline Vec gelu(Vec x) { return x * normal_cdf(x); }

inline Vec sigmoid(Vec x) { return 1 / (1 + exponential(-x)); }

// to[c][r] = from[r][c], numbers of 32 bits.
inline void transpose(const float* from, long from_row, long rows, long columns, float* to,
                      long to_row) {
  long r = 0;
  for (; r + 4 <= rows; r += 4) {
    long c = 0;
    for (; c + 4 <= columns; c += 4) {
      __m128 block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) block[i] = _mm_loadu_ps(from + (r + i) * from_row + c);
      _MM_TRANSPOSE4_PS(block[0], block[1], block[2], block[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (c + i) * to_row + r, block[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < 4; ++i) to[c * to_row + r + i] = from[(r + i) * from_row + c];
  }
  for (; r < rows; ++r)
    for (long c = 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace
