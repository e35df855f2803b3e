// Reads 32-bit patterns of floats x from standard input, prints those of exp2_polynomial(x).
#include <iostream>

#include "attention/exponential.cuh"

int main() {
  using namespace diffusion_fast;
  for (uint32_t bits; std::cin >> bits;)
    std::cout << ptx::bits_of(exp2_polynomial(ptx::float_of(bits))) << "\n";
}
