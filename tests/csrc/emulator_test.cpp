// Small kernels with one defect each, to see the emulator name it. `emulator_test NAME` prints the
// report's lines; `emulator_test floats` prints every 16-bit pattern's value and the pattern that
// value rounds to.
#include <cstring>
#include <iostream>

#include "device.cuh"

using namespace diffusion_fast;

namespace {

alignas(16) const uint8_t kSource[64] = {};

void clean(int) {
  const uint32_t at = ptx::shared_base() + threadIdx.x * 4;
  ptx::store_shared32(at, threadIdx.x);
  __syncthreads();
  ptx::load_shared128(ptx::shared_base() + threadIdx.x / 4 * 16);
}
void no_barrier(int) {
  ptx::store_shared32(ptx::shared_base() + threadIdx.x * 4, threadIdx.x);
  ptx::load_shared128(ptx::shared_base() + threadIdx.x / 4 * 16);
}
void syncwarp_across_warps(int) {  // orders one warp, not the other
  ptx::store_shared32(ptx::shared_base() + threadIdx.x * 4, threadIdx.x);
  __syncwarp();
  ptx::load_shared128(ptx::shared_base() + (63 - threadIdx.x) / 4 * 16);
}
void write_after_read(int) {
  ptx::store_shared32(ptx::shared_base() + threadIdx.x * 4, threadIdx.x);
  __syncthreads();
  ptx::load_shared128(ptx::shared_base() + threadIdx.x / 4 * 16);
  ptx::store_shared32(ptx::shared_base() + threadIdx.x * 4, threadIdx.x);
}
void never_written(int) { ptx::load_shared128(ptx::shared_base()); }
void out_of_range(int) { ptx::store_shared32(ptx::shared_base() + 4096, 0); }
void misaligned(int) { ptx::load_shared128(ptx::shared_base() + 4); }
void divergent(int) {
  if (threadIdx.x == 3) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xffffffffu, 0.f, 1);
  }
}
void deadlock(int) {
  if (threadIdx.x != 3) __syncthreads();
}
void two_barriers(int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void copy_not_waited_for(int) {
  if (threadIdx.x == 0) {
    ptx::cp_async16(ptx::shared_base(), kSource, true);
    ptx::cp_async_commit();
    ptx::load_shared128(ptx::shared_base());
    ptx::cp_async_wait<0>();
  }
}
void copy_never_waited_for(int) {
  ptx::cp_async16(ptx::shared_base() + threadIdx.x * 16, kSource, true);
  ptx::cp_async_commit();
}
void copy_not_committed(int) {  // a wait covers committed groups only
  ptx::cp_async16(ptx::shared_base() + threadIdx.x * 16, kSource, true);
  ptx::cp_async_wait<0>();
}
void copy_seen_by_another(int) {  // waiting makes it visible to the waiting thread alone
  ptx::cp_async16(ptx::shared_base() + threadIdx.x * 16, kSource, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::load_shared128(ptx::shared_base() + (threadIdx.x ^ 1) * 16);
}
void copy_from_odd_address(int) {
  ptx::cp_async16(ptx::shared_base() + threadIdx.x * 16, kSource + 4, true);
}
void bank_conflicts(
    int) {  // eight rows 128 bytes apart: 7 extra passes per block of rows, 4 blocks, 2 warps
  for (int i = 0; i < 16; ++i)
    ptx::store_shared32(ptx::shared_base() + (threadIdx.x + i * 64) * 4, 0);
  __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_base() + threadIdx.x % 8 * 128);
}

const struct {
  const char* name;
  void (*kernel)(int);
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(clean),
    KERNEL(no_barrier),
    KERNEL(syncwarp_across_warps),
    KERNEL(write_after_read),
    KERNEL(never_written),
    KERNEL(out_of_range),
    KERNEL(misaligned),
    KERNEL(divergent),
    KERNEL(deadlock),
    KERNEL(two_barriers),
    KERNEL(copy_not_waited_for),
    KERNEL(copy_never_waited_for),
    KERNEL(copy_not_committed),
    KERNEL(copy_seen_by_another),
    KERNEL(copy_from_odd_address),
    KERNEL(bank_conflicts),
};

template <typename T>
void print_floats(const char* name) {
  for (int i = 0; i < 65536; ++i) {
    const float f = ptx::to_float<T>(static_cast<uint16_t>(i));
    std::cout << name << " " << i << " " << emulator::float_bits(f) << " "
              << (ptx::pack<T>(f, 0.f) & 0xffff) << "\n";
  }
}

// Rounds each 32-bit pattern on standard input.
void round_floats() {
  for (uint32_t bits; std::cin >> bits;) {
    const float f = emulator::bits_float(bits);
    std::cout << (ptx::pack<Half>(f, 0.f) & 0xffff) << " " << (ptx::pack<Bfloat16>(0.f, f) >> 16)
              << "\n";
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string wanted = arguments[1];
  if (wanted == "floats") {
    print_floats<Half>("Half");
    print_floats<Bfloat16>("Bfloat16");
  }
  if (wanted == "round") round_floats();
  for (const auto& k : kKernels)
    if (wanted == k.name) ptx::launch(k.kernel, 1, 64, 4096, 0, nullptr);
  for (const std::string& e : emulator::report.errors) std::cout << e << "\n";
  std::cout << "conflicts " << emulator::report.bank_conflicts << "\n";
}
