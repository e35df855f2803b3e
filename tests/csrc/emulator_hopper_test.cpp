// As emulator_test.cpp, for the instructions of sm_90a: small kernels with one defect each. One
// warpgroup; a tile of 64 rows of 64 values is both operands of a 64x64 product, brought in one
// box.
#include <cstring>
#include <iostream>

#include "device.cuh"

using namespace diffusion_fast;

namespace {

constexpr int kThreads = 128, kTile = 64 * 64 * 2, kBarrier = 2 * kTile, kShared = 3 * kTile;
alignas(16) uint16_t source[64 * 64];
float result[kThreads][32];

struct Params {
  TensorMap map;
};

uint64_t operand(uint32_t start) {  // 128-byte swizzle, 8 rows every 1024 bytes
  return (start & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
uint32_t tile() { return ptx::shared_base(); }
uint32_t barrier() { return tile() + kBarrier; }

void make_barrier(int count = 1) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier(), count);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
}
void load(const Params& p, int bytes = kTile) {
  if (threadIdx.x != 0) return;
  ptx::mbarrier_arrive_and_expect(barrier(), bytes);
  ptx::load_box(tile(), p.map, barrier(), 0, 0, 0, 0);
}
void get_tile(const Params& p) {
  make_barrier();
  load(p);
  ptx::mbarrier_wait(barrier(), 0);
}
// d += A A^T over all 64 values of k; leaves the wait to the caller.
void multiply(float* d) {
  ptx::wgmma_fence();
  for (uint32_t step = 0; step < 4; ++step) {
    const uint64_t a = operand(tile() + step * 32);
    ptx::wgmma_shared<Bfloat16, 64>(d, a, a, step > 0);
  }
  ptx::wgmma_commit();
}
void multiply_and_keep() {
  float d[32];
  multiply(d);
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) result[threadIdx.x][i] = d[i];
}

void clean(Params p) {
  get_tile(p);
  multiply_and_keep();
}
void barrier_not_shown(Params p) {
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier(), 1);
  __syncthreads();
  load(p);
  ptx::mbarrier_wait(barrier(), 0);
}
void barrier_before_it_was_made(Params) {
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier(), 2);
  if (threadIdx.x < 2) ptx::mbarrier_arrive(barrier());
}
void no_barrier_there(Params) { ptx::mbarrier_arrive(barrier()); }
void too_many_arrivals(Params) {
  make_barrier(2);
  if (threadIdx.x == 0) ptx::mbarrier_arrive_and_expect(barrier(), 16);  // the phase stays
  if (threadIdx.x < 2) ptx::mbarrier_arrive(barrier());
}
void other_parity(Params p) {  // as if of the phase before: not waited for
  make_barrier();
  load(p);
  ptx::mbarrier_wait(barrier(), 1);
  multiply_and_keep();
}
void more_bytes_announced(Params p) {
  make_barrier();
  load(p, kTile + 16);
  ptx::mbarrier_wait(barrier(), 0);
}
void box_not_waited_for(Params p) {
  make_barrier();
  load(p);
  multiply_and_keep();
}
void box_over_box(Params p) {
  make_barrier();
  load(p, 2 * kTile);
  if (threadIdx.x == 0) ptx::load_box(tile(), p.map, barrier(), 0, 0, 0, 0);
  ptx::mbarrier_wait(barrier(), 0);
}
void box_over_barrier(Params p) {
  make_barrier();
  if (threadIdx.x == 0) ptx::load_box(tile() + 2 * kTile, p.map, barrier(), 0, 0, 0, 0);
}
void box_off_its_pattern(Params p) {
  make_barrier();
  if (threadIdx.x == 0) ptx::load_box(tile() + 128, p.map, barrier(), 0, 0, 0, 0);
}
void no_fence(Params p) {
  get_tile(p);
  float d[32];
  ptx::wgmma_shared<Bfloat16, 64>(d, operand(tile()), operand(tile()), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}
void product_not_waited_for(Params p) {
  get_tile(p);
  multiply(result[threadIdx.x]);
}
void product_not_committed(Params p) {
  get_tile(p);
  ptx::wgmma_fence();
  ptx::wgmma_shared<Bfloat16, 64>(result[threadIdx.x], operand(tile()), operand(tile()), false);
  ptx::wgmma_wait<0>();
}
void accumulators_written(Params p) {
  get_tile(p);
  float* d = result[threadIdx.x];
  multiply(d);
  d[3] = 1.f;
  ptx::wgmma_wait<0>();
}
void registers_overwritten(Params p) {
  get_tile(p);
  static uint32_t a[kThreads][4];
  ptx::wgmma_fence();
  ptx::wgmma_registers<Bfloat16, 64>(result[threadIdx.x], a[threadIdx.x], operand(tile()));
  ptx::wgmma_commit();
  a[threadIdx.x][2] = 1;
  ptx::wgmma_wait<0>();
}
void operand_overwritten(Params p) {
  get_tile(p);
  multiply(result[threadIdx.x]);
  if (threadIdx.x == 0) ptx::store_shared32(tile(), 0);
  ptx::wgmma_wait<0>();
}
void operand_released_early(Params p) {  // other warps may still read when the first one has waited
  get_tile(p);
  multiply(result[threadIdx.x]);
  ptx::wgmma_wait<0>();
  if (threadIdx.x == 0) ptx::store_shared32(tile(), 0);
}
void no_proxy_fence(Params p) {
  get_tile(p);
  ptx::store_shared32(tile() + threadIdx.x * 4, 0);
  __syncthreads();
  multiply_and_keep();
}
void no_barrier_after_proxy_fence(Params p) {
  get_tile(p);
  ptx::store_shared32(tile() + threadIdx.x * 4, 0);
  ptx::proxy_fence();
  multiply_and_keep();
}
void operand_off_its_pattern(Params p) {
  get_tile(p);
  ptx::wgmma_fence();
  ptx::wgmma_shared<Bfloat16, 64>(result[threadIdx.x], operand(tile() + 128), operand(tile()),
                                  false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}
void a_warp_left_out(Params p) {
  get_tile(p);
  if (threadIdx.x < 96) multiply_and_keep();
}
void warps_differ(Params p) {
  get_tile(p);
  float d[32];
  ptx::wgmma_fence();
  ptx::wgmma_shared<Bfloat16, 64>(d, operand(tile()), operand(tile() + threadIdx.x / 64 * 32),
                                  false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}
void named_barrier_alone(Params p) {
  get_tile(p);
  if (threadIdx.x < 32) ptx::named_barrier(1, 64);
}
void named_barrier_orders(Params p) {  // no defect: it orders what its threads did
  get_tile(p);
  ptx::store_shared32(tile() + threadIdx.x * 4, 0);
  ptx::proxy_fence();
  ptx::named_barrier(1, kThreads);
  multiply_and_keep();
}

const struct {
  const char* name;
  void (*kernel)(Params);
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(clean),
    KERNEL(barrier_not_shown),
    KERNEL(barrier_before_it_was_made),
    KERNEL(no_barrier_there),
    KERNEL(too_many_arrivals),
    KERNEL(other_parity),
    KERNEL(more_bytes_announced),
    KERNEL(box_not_waited_for),
    KERNEL(box_over_box),
    KERNEL(box_over_barrier),
    KERNEL(box_off_its_pattern),
    KERNEL(no_fence),
    KERNEL(product_not_waited_for),
    KERNEL(product_not_committed),
    KERNEL(accumulators_written),
    KERNEL(registers_overwritten),
    KERNEL(operand_overwritten),
    KERNEL(operand_released_early),
    KERNEL(no_proxy_fence),
    KERNEL(no_barrier_after_proxy_fence),
    KERNEL(operand_off_its_pattern),
    KERNEL(a_warp_left_out),
    KERNEL(warps_differ),
    KERNEL(named_barrier_alone),
    KERNEL(named_barrier_orders),
};

// The product of clean(), from the layouts' definition: thread t, sum i is row 16 (t / 32) + t % 32
// / 4 + 8 (i / 2 % 2).
bool is_product() {
  float x[64][64];
  for (int i = 0; i < 64 * 64; ++i) x[i / 64][i % 64] = ptx::to_float<Bfloat16>(source[i]);
  for (int t = 0; t < kThreads; ++t)
    for (int i = 0; i < 32; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8,
                column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = 0.f;
      for (int k = 0; k < 64; ++k) sum += x[row][k] * x[column][k];
      if (sum != result[t][i]) return false;  // small integers: exact
    }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  uint32_t state = 1;
  for (uint16_t& x : source) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<uint16_t>(ptx::pack<Bfloat16>(static_cast<float>(state >> 28) - 8.f, 0.f));
  }
  Params params{};
  ptx::encode<Bfloat16>(&params.map, {source, {64, 64, 1, 1}, {128, 128, 128}, 64, 64});
  for (const auto& k : kKernels)
    if (std::string(arguments[1]) == k.name)
      ptx::launch(k.kernel, 1, kThreads, kShared, params, nullptr);
  for (const std::string& e : emulator::report.errors) std::cout << e << "\n";
  std::cout << "product " << is_product() << "\n";
}
