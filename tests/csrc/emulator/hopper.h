// The names of ../hopper.cuh, on the host. Included by instructions.h alone.
#pragma once
#include "wgmma.h"

namespace diffusion_fast::ptx {

constexpr bool kHopper = true;

inline void mbarrier_init(uint32_t barrier, int count, DIFFUSION_FAST_AT) {
  emulator::products().make(barrier, count, line);
}
inline void mbarrier_init_fence() { emulator::products().show(); }
inline void mbarrier_arrive(uint32_t barrier, DIFFUSION_FAST_AT) {
  emulator::products().arrive(barrier, 0, line);
}
inline void mbarrier_arrive_and_expect(uint32_t barrier, int bytes, DIFFUSION_FAST_AT) {
  emulator::products().arrive(barrier, bytes, line);
}
inline void mbarrier_wait(uint32_t barrier, int parity, DIFFUSION_FAST_AT) {
  emulator::products().wait(barrier, parity, line);
}
inline void named_barrier(int number, int threads, DIFFUSION_FAST_AT) {
  emulator::products().meet(number, threads, line);
}

inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row,
                     int head, int batch, DIFFUSION_FAST_AT) {
  emulator::BoxCopy copy{{}, to, barrier, {column, row, head, batch}};
  memcpy(&copy.tensor, &map, sizeof copy.tensor);
  emulator::products().copy(copy, line);
}
inline void proxy_fence() {
  emulator::Thread& me = *emulator::block->current;
  for (uint32_t word : me.unfenced) emulator::block->words[word].unfenced = false;
  me.unfenced.clear();
}

// Without meaning here: a fiber has the registers it wants.
template <int kRegisters>
void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void claim_registers() {
  release_registers<kRegisters>();
}
inline void pin(float&) {}
inline void pin(uint32_t&) {}

inline void wgmma_fence(DIFFUSION_FAST_AT) {
  using namespace emulator;
  warp_collective(kWgmma, nullptr, "wgmma.fence", line, [](Warp&, void**) { products().fence(); });
}
inline void wgmma_commit(DIFFUSION_FAST_AT) {
  using namespace emulator;
  warp_collective(kWgmma + 1, nullptr, "wgmma.commit_group", line,
                  [](Warp&, void**) { products().commit(); });
}
template <int kPending>
void wgmma_wait(DIFFUSION_FAST_AT) {
  using namespace emulator;
  warp_collective(kWgmma + 2, nullptr, "wgmma.wait_group", line,
                  [](Warp&, void**) { products().wait(kPending); });
}

template <typename T, int kN>
void wgmma(float* d, const uint32_t* a, uint64_t a_bits, uint64_t b_bits, bool accumulate,
           int line) {
  using namespace emulator;
  static_assert(kN % 8 == 0 && kN <= 256);
  struct Argument {
    float* d;
    const uint32_t* a;
    uint64_t a_bits, b_bits;
  } mine{d, a, a_bits, b_bits};
  warp_collective(kWgmma + 3 + (a != nullptr), &mine, "wgmma", line, [=](Warp&, void** arguments) {
    Product p{{}, {}, {}, a_bits, b_bits, accumulate, kN, line, 0, 0, value_table<T>(), {}};
    for (int lane = 0; lane < 32; ++lane) {
      const Argument& argument = *static_cast<Argument*>(arguments[lane]);
      p.d[lane] = argument.d;
      p.a[lane] = argument.a;
      if (argument.a_bits != a_bits || argument.b_bits != b_bits)
        fail("wgmma: descriptors differ, line " + std::to_string(line));
    }
    products().issue(std::move(p));
  });
}
template <typename T, int kN>
void wgmma_shared(float* d, uint64_t a, uint64_t b, bool accumulate, DIFFUSION_FAST_AT) {
  wgmma<T, kN>(d, nullptr, a, b, accumulate, line);
}
template <typename T, int kN>
void wgmma_registers(float* d, const uint32_t (&a)[4], uint64_t b, DIFFUSION_FAST_AT) {
  wgmma<T, kN>(d, a, 0, b, true, line);
}

inline const char* without_hopper(const void*, int) { return nullptr; }

template <typename T>
const char* encode(TensorMap* map, const BoxedTensor& t) {
  const auto columns = static_cast<uint32_t>(t.box_columns),
             rows = static_cast<uint32_t>(t.box_rows);
  emulator::EncodedTensor e{static_cast<const uint8_t*>(t.base), {}, {}, columns, rows};
  bool good = reinterpret_cast<uintptr_t>(t.base) % 16 == 0 && t.box_rows > 0 &&
              t.box_rows <= 256 &&
              (t.box_columns == 16 || t.box_columns == 32 || t.box_columns == 64);
  for (int i = 0; i < 4; ++i) {
    good &= t.size[i] >= 1 && t.size[i] <= uint64_t{1} << 32;
    e.size[i] = static_cast<uint32_t>(t.size[i]);
  }
  for (int i = 0; i < 3; ++i) {
    good &= t.stride[i] % 16 == 0 && t.stride[i] < uint64_t{1} << 40;
    e.stride[i] = t.stride[i];
  }
  memcpy(map, &e, sizeof e);
  return good ? nullptr : "the copy engine cannot read q, k or v with these sizes and strides";
}

}  // namespace diffusion_fast::ptx
