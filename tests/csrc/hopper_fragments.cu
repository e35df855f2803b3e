// One warpgroup through the building blocks of the Hopper kernel: boxes into shared memory, Q K^T,
// P V. Compiled by nvcc for sm_90a it prints what the GPU does, compiled by g++ (-x c++) what the
// emulator does. All values are small integers, so that every sum is exact and the two must agree
// in every bit. Rows and columns past the end are there: 50 queries, 120 keys.
#include <cstdio>
#include <cstdlib>

#include "attention/launch.cuh"

using namespace diffusion_fast;

constexpr int kQueries = 50, kKeyRows = 120, kHeads = 2;

struct FragmentParams {
  TensorMap q, k, v;
  uint32_t* out;  // [words][kWarpgroup]
};

template <int kHeadDim>
constexpr int kWords =
    64 + HopperShape<kHeadDim>::kColumns / 2 + HopperShape<kHeadDim>::kTile / 4 / kWarpgroup;

template <int kHeadDim>
__global__ void __launch_bounds__(kWarpgroup)
    hopper_fragments(const __grid_constant__ FragmentParams p) {
  if constexpr (ptx::kHopper) {
    using Shape = HopperShape<kHeadDim>;
    const HopperMemory<kHeadDim> memory;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(memory.full(0), 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_and_expect(memory.full(0), Shape::kQuery + 2 * Shape::kTile);
      for (int box = 0; box < Shape::kBoxes; ++box) {
        const int column = box * Shape::kBoxColumns;
        ptx::load_box(memory.own(0) + box * Shape::kGroupRows * Shape::kSwizzle, p.q,
                      memory.full(0), column, 0, 1, 0);
        ptx::load_box(memory.slot(0) + box * Shape::kKeys * Shape::kSwizzle, p.k, memory.full(0),
                      column, 0, 1, 0);
        ptx::load_box(memory.slot(1) + box * Shape::kKeys * Shape::kSwizzle, p.v, memory.full(0),
                      column, 0, 0, 0);
      }
    }
    ptx::mbarrier_wait(memory.full(0), 0);
    Scores<> s[8];
    Rounded<> probabilities[8];
    Accumulator<Shape::kColumns> o;
    for (int i = 0; i < 32; ++i)
      probabilities[i / 4].x[0][i % 4] =
          ptx::pack<Bfloat16>(static_cast<float>((threadIdx.x + i) % 5), static_cast<float>(i % 3));
    float *scores = &s[0].x[0][0][0], *outputs = &o.x[0][0][0];
    auto pin_all = [&] {
      for (int i = 0; i < 64; ++i) ptx::pin(scores[i]);
      for (int i = 0; i < Shape::kColumns / 2; ++i) ptx::pin(outputs[i]);
      for (int i = 0; i < 32; ++i) ptx::pin(probabilities[i / 4].x[0][i % 4]);
    };
    pin_all();
    ptx::wgmma_fence();
    multiply_queries<Bfloat16, kHeadDim>(scores, memory.own(0), memory.slot(0));
    ptx::wgmma_fence();
    multiply_values<Bfloat16, kHeadDim>(outputs, probabilities, memory.slot(1));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin_all();
    uint32_t* out = p.out + threadIdx.x;
    for (int i = 0; i < 64; ++i, out += kWarpgroup) *out = ptx::bits_of(scores[i]);
    for (int i = 0; i < Shape::kColumns / 2; ++i, out += kWarpgroup)
      *out = ptx::bits_of(outputs[i]);
    for (int i = 0; i < Shape::kTile / 16 / kWarpgroup;
         ++i) {  // where the copy engine put each value of V
      const uint4 x = ptx::load_shared128(memory.slot(1) + (i * kWarpgroup + threadIdx.x) * 16);
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
      for (uint32_t word : words) {
        *out = word;
        out += kWarpgroup;
      }
    }
  }
}

template <typename T>
T* allocate(size_t count) {
#if defined(__CUDACC__)
  T* memory = nullptr;
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::exit(2);
  return memory;
#else
  return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
#endif
}

template <int kHeadDim>
void run() {
  using Shape = HopperShape<kHeadDim>;
  constexpr int kCount = kKeyRows * kHeads * kHeadDim;
  auto* values = allocate<uint16_t>(3 * kCount);
  uint32_t state = kHeadDim;
  for (int i = 0; i < 3 * kCount; ++i) {  // -3 to 3, as bf16
    constexpr uint16_t kSmall[] = {0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x3f80};
    values[i] = kSmall[(state = state * 1664525u + 1013904223u) >> 29];
  }
  ForwardParams p{};
  p.batch = 1;
  p.heads = kHeads;
  const Strides strides{0, kHeads * kHeadDim, kHeadDim};
  FragmentParams params{};
  const char* error =
      ptx::without_hopper(reinterpret_cast<const void*>(hopper_fragments<kHeadDim>), kWarpgroup);
  auto encode = [&](TensorMap* map, const uint16_t* from, int rows, int box_rows) {
    if (error == nullptr)
      error = ptx::encode<Bfloat16>(map, boxed<kHeadDim>(from, strides, p, rows, box_rows));
  };
  encode(&params.q, values, kQueries, Shape::kGroupRows);
  encode(&params.k, values + kCount, kKeyRows, Shape::kKeys);
  encode(&params.v, values + 2 * kCount, kKeyRows, Shape::kKeys);
  params.out = allocate<uint32_t>(kWords<kHeadDim> * kWarpgroup);
  for (int i = 0; i < kWords<kHeadDim> * kWarpgroup; ++i) params.out[i] = 0xffffffffu;
  if (error == nullptr)
    error = ptx::launch(hopper_fragments<kHeadDim>, 1, kWarpgroup, Shape::kShared, params, nullptr);
#if defined(__CUDACC__)
  if (error == nullptr && cudaDeviceSynchronize() != cudaSuccess) error = "the kernel failed";
#else
  if (!emulator::report.errors.empty()) error = emulator::report.errors[0].c_str();
#endif
  if (error != nullptr) {
    std::fprintf(stderr, "head dim %d: %s\n", kHeadDim, error);
    std::exit(1);
  }
  for (int i = 0; i < kWords<kHeadDim> * kWarpgroup; ++i)
    std::printf("%d %u\n", kHeadDim, params.out[i]);
}

int main() {  // 32-, 64- and 128-byte swizzle, one box and more
  run<40>();
  run<32>();
  run<160>();
  run<64>();
  run<128>();
}
