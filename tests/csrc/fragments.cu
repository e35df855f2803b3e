// One warp through every instruction of device.cuh on fixed pseudo-random inputs. Compiled by nvcc
// it prints what the GPU does, compiled by g++ (-x c++) what the emulator does: lines of "name
// index bits".
#include <cstdio>
#include <cstdlib>

#include "device.cuh"

using namespace diffusion_fast;

constexpr int kLanes = 32, kWords = 64;  // results of one lane

struct Params {
  const uint16_t* tile;  // 32 rows of 8 values: four 8x8 blocks
  const float* floats;   // one per lane
  uint32_t* out;         // [kWords, kLanes]
};

template <typename T>
__device__ __forceinline__ int multiply(const Params& p, uint32_t* out, int at) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[4], a2[2];
  const uint32_t row = ptx::shared_base() + lane * 16;
  ptx::ldmatrix_x4(a, row);
  ptx::ldmatrix_x4_transposed(b, row);
  ptx::ldmatrix_x2(a2, ptx::shared_base() + (lane & 15) * 16);
  float d[4] = {p.floats[lane], 1.f, -2.f, 0.5f}, e[4] = {0.f, p.floats[lane], 3.f, 1.f};
  ptx::mma_m16n8k16<T>(d, a, b[0], b[1]);
  ptx::mma_m16n8k8<T>(e, a2, b[2]);
  for (int i = 0; i < 4; ++i) out[(at + i) * kLanes + lane] = ptx::pack<T>(d[i], e[i]);
  for (int i = 0; i < 4; ++i) out[(at + 4 + i) * kLanes + lane] = a[i];
  for (int i = 0; i < 4; ++i) out[(at + 8 + i) * kLanes + lane] = b[i];
  for (int i = 0; i < 2; ++i) out[(at + 12 + i) * kLanes + lane] = a2[i];
  ptx::ldmatrix_x2_transposed(a2, ptx::shared_base() + (lane & 15) * 16);
  for (int i = 0; i < 2; ++i) out[(at + 14 + i) * kLanes + lane] = a2[i];
  out[(at + 16) * kLanes + lane] = ptx::pack<T>(p.floats[lane], -p.floats[lane] * 1e-6f);
  return at + 17;
}

__global__ void fragments(const __grid_constant__ Params p) {
  const int lane = threadIdx.x;
  ptx::cp_async16(ptx::shared_base() + lane * 16, p.tile + lane * 8, true);
  ptx::cp_async16(ptx::shared_base() + 512 + lane * 16, p.tile, false);  // zeros
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  int at = multiply<Half>(p, p.out, 0);
  at = multiply<Bfloat16>(p, p.out, at);
  const uint4 v = ptx::load_shared128(ptx::shared_base() + (lane ^ 5) * 16),
              z = ptx::load_shared128(ptx::shared_base() + 512 + lane * 16);
  const uint32_t loaded[4] = {v.x, v.w, z.x | z.y, z.z | z.w};
  for (int i = 0; i < 4; ++i) p.out[at++ * kLanes + lane] = loaded[i];
  __syncwarp();
  ptx::store_shared_float(ptx::shared_base() + lane * 4, p.floats[lane]);
  __syncwarp();
  const float2 pair = ptx::load_shared_float2(ptx::shared_base() + (lane / 2) * 8);
  ptx::store_shared32(ptx::shared_base() + 512 + lane * 4, lane);
  // Rounded to 16 bits: the approximate exponential may differ in its last bits.
  p.out[at++ * kLanes + lane] = ptx::pack<Bfloat16>(pair.x, pair.y);
  p.out[at++ * kLanes + lane] = ptx::pack<Half>(ptx::exp2_approximate(p.floats[lane]),
                                                __shfl_xor_sync(0xffffffffu, p.floats[lane], 9));
}

template <typename T>
T* allocate(int count) {
#if defined(__CUDACC__)
  T* memory = nullptr;
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::exit(2);
  return memory;
#else
  return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
#endif
}

int main() {
  auto* tile = allocate<uint16_t>(256);
  auto* floats = allocate<float>(kLanes);
  auto* out = allocate<uint32_t>(kWords * kLanes);
  uint32_t state = 1;
  auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
  // Exponents near 1 in both types, so that products neither overflow nor vanish.
  for (int i = 0; i < 256; ++i) tile[i] = static_cast<uint16_t>((random() & 0x83ff) | 0x3c00);
  for (int i = 0; i < kLanes; ++i) floats[i] = static_cast<float>(random() % 8192) / 1024.f - 4.f;
  for (int i = 0; i < kWords * kLanes; ++i) out[i] = 0;
  const char* error = ptx::launch(fragments, 1, kLanes, 1024, Params{tile, floats, out}, nullptr);
#if defined(__CUDACC__)
  if (error == nullptr && cudaDeviceSynchronize() != cudaSuccess) error = "the kernel failed";
#else
  if (!emulator::report.errors.empty()) error = emulator::report.errors[0].c_str();
#endif
  if (error != nullptr) {
    std::fprintf(stderr, "%s\n", error);
    return 1;
  }
  for (int i = 0; i < kWords * kLanes; ++i) std::printf("%u\n", out[i]);
}
