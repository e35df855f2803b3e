// What the warp-wide instructions compute: fragment layouts of the PTX ISA, sections
// "mma.m16n8k16", "mma.m16n8k8" and "ldmatrix". In every fragment lane l holds row l / 4 (group)
// and columns 2 (l % 4), 2 (l % 4) + 1.
#pragma once
#include <cmath>

#include "shared_memory.h"

namespace diffusion_fast::emulator {

inline uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline float from_bits(uint16_t bits, Bfloat16) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}
inline float from_bits(uint16_t bits, Half) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

inline uint16_t to_bits(float f, Bfloat16) {  // round to nearest even
  if (f != f) return 0x7fff;
  const uint32_t u = float_bits(f);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline uint16_t to_bits(float f, Half) {
  if (f != f) return 0x7fff;
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (a >= 65520.f) return sign | 0x7c00;  // rounds past the largest finite, 65504
  int exponent = -13;                      // subnormals and zero share one spacing
  if (a > 0.f) std::frexp(a, &exponent);
  exponent = std::max(exponent, -13);
  const float units = std::nearbyint(std::ldexp(a, 11 - exponent));  // 11 significant bits
  // 0 for subnormals; a carry out of the mantissa lands in the exponent by itself
  const int base = exponent + 13;
  return static_cast<uint16_t>(sign | (base * 1024 + static_cast<int>(units)));
}

// Every 16-bit value as a float: mma spends its time converting.
template <typename T>
const float* value_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) t[i] = from_bits(static_cast<uint16_t>(i), T{});
    return t;
  }();
  return table.data();
}

struct MmaArgument {
  float* d;
  uint32_t a[4], b[2];
};

// D (16x8) += A (16xkDepth) B (kDepthx8) in float, in order of k (the order in which tensor cores
// add is not documented).
template <typename T, int kDepth>
void execute_mma(void** arguments) {
  const float* value = value_table<T>();
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaArgument& m = *static_cast<MmaArgument*>(arguments[lane]);
    const int group = lane / 4, column = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < kDepth / 4; ++r)
        a[group + r % 2 * 8][column + e + r / 2 * 8] = value[m.a[r] >> 16 * e & 0xffff];
      for (int r = 0; r < kDepth / 8; ++r)
        b[column + e + r * 8][group] = value[m.b[r] >> 16 * e & 0xffff];
    }
    for (int r = 0; r < 4; ++r) d[group + r / 2 * 8][column + r % 2] = m.d[r];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) d[i][n] += a[i][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      static_cast<MmaArgument*>(arguments[lane])->d[r] =
          d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  ++block->report->mma;
}

struct LdmatrixArgument {
  uint32_t* r;
  uint32_t from;
};

template <int kBlocks, bool kTransposed>
void execute_ldmatrix(int warp, void** arguments, int line) {
  for (int m = 0; m < kBlocks; ++m) {
    uint16_t x[8][8];
    uint32_t rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<LdmatrixArgument*>(arguments[m * 8 + i])->from;
      memcpy(x[i], shared_at(rows[i], 16, line), 16);
      on_read(rows[i], 16, block->threads[warp * 32 + m * 8 + i],
              line);  // charged to the lane that named the row
    }
    count_bank_conflicts(rows);
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, column = lane % 4 * 2;
      const uint16_t low = kTransposed ? x[column][group] : x[group][column];
      const uint16_t high = kTransposed ? x[column + 1][group] : x[group][column + 1];
      static_cast<LdmatrixArgument*>(arguments[lane])->r[m] = low | static_cast<uint32_t>(high)
                                                                        << 16;
    }
  }
  ++block->report->ldmatrix;
}

}  // namespace diffusion_fast::emulator
