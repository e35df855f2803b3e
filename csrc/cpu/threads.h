// How many threads a piece of work is shared out to: each must be worth its start and the wait for
// the last of them, which on a busy machine is long.
#pragma once

#include <algorithm>

namespace {

constexpr double kLeastProducts = 500000;  // multiply-adds of a thread
constexpr long kLeastElements = 16384;     // that a thread goes over

inline int threads_for_products(double multiply_adds, int most) {
  return int(std::clamp<double>(multiply_adds / kLeastProducts, 1, most));
}

inline int threads_for_elements(long elements, int most) {
  return int(std::clamp<long>(elements / kLeastElements, 1, most));
}

}  // namespace
