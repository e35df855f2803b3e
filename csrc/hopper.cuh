// Instructions of sm_90a, included by device.cuh for nvcc (the emulator's are in
// tests/csrc/emulator/hopper.h): mbarriers, the copy engine (TMA), warpgroup products (wgmma),
// register shares. Sections are those of the PTX ISA, version 9.0.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace diffusion_fast::ptx {

// Elsewhere kernels that need these instructions have no body, and room for too few threads to be
// started by mistake.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// ---- mbarriers, 9.7.13.15: 8 bytes of shared memory each. A phase ends when `count` threads have
// arrived and all bytes that were announced have landed; then the next one begins.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// By the thread that initialised, before the __syncthreads: shows the barriers to the copy engine
// as well.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase with this parity (the first phase has 0). A fresh barrier counts
// as past a phase 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// ---- named barriers, 9.7.13.1: `threads` threads (whole warps) meet; number 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- the copy engine, 9.7.9.27.1.2 (cp.async.bulk.tensor)
// One box: columns and rows from `column` and `row` on, of one head of one batch item. What lies
// outside the tensor becomes zeros, and counts among the bytes that the barrier waits for.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, uint32_t barrier,
                                         int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row), "r"(head),
      "r"(batch)
      : "memory");
}
// Makes this thread's ordinary stores to shared memory visible to wgmma and the copy engine
// (9.7.13.4, membar/fence).
__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- register shares, 9.7.20.5 (setmaxnreg): by all warps of a warpgroup
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma, 9.7.15: asynchronous products of a warpgroup. Between the fence before a product and
// the wait behind it the program leaves the product's registers alone; `pin` keeps the compiler
// from moving work on a register across.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

// d (64xkN, float, kN / 2 in a row per thread: 9.7.15.5.1.1.1) += A B over 16 values of k.
// wgmma_shared: A and B in shared memory, both with k contiguous; accumulate == false starts from
// zero. wgmma_registers: A in registers, B with n contiguous (imm-trans-b).
template <typename T, int kN>
__device__ __forceinline__ void wgmma_shared(float* d, uint64_t a, uint64_t b, bool accumulate);
template <typename T, int kN>
__device__ __forceinline__ void wgmma_registers(float* d, const uint32_t (&a)[4], uint64_t b);

#define DF_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define DF_NAMES_24 DF_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define DF_NAMES_32 DF_NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define DF_NAMES_40 DF_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define DF_NAMES_48 DF_NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define DF_NAMES_64 DF_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define DF_NAMES_80 DF_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define DF_EIGHT(d, i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define DF_SUMS_16(d) DF_EIGHT(d, 0), DF_EIGHT(d, 8)
#define DF_SUMS_24(d) DF_SUMS_16(d), DF_EIGHT(d, 16)
#define DF_SUMS_32(d) DF_SUMS_24(d), DF_EIGHT(d, 24)
#define DF_SUMS_40(d) DF_SUMS_32(d), DF_EIGHT(d, 32)
#define DF_SUMS_48(d) DF_SUMS_40(d), DF_EIGHT(d, 40)
#define DF_SUMS_64(d) DF_SUMS_48(d), DF_EIGHT(d, 48), DF_EIGHT(d, 56)
#define DF_SUMS_80(d) DF_SUMS_64(d), DF_EIGHT(d, 64), DF_EIGHT(d, 72)

// Operands behind the sums: the predicate scale-d, scales of A and B, and which operands are
// transposed.
#define DF_WGMMA_SHARED(T, NAME, N, SUMS, A, B, P)                                     \
  template <>                                                                          \
  __device__ __forceinline__ void wgmma_shared<T, N>(float* d, uint64_t a, uint64_t b, \
                                                     bool accumulate) {                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                 \
                 ", 0;\n"                                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME       \
                 " {" DF_NAMES_##SUMS "}, " A ", " B ", p, 1, 1, 0, 0;\n}"             \
                 : DF_SUMS_##SUMS(d)                                                   \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                 \
  }
#define DF_WGMMA_REGISTERS(T, NAME, N, SUMS, A0, A1, A2, A3, B, P)                                 \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma_registers<T, N>(float* d, const uint32_t (&a)[4],          \
                                                        uint64_t b) {                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                             \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                   \
                 " {" DF_NAMES_##SUMS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 1;\n}" \
                 : DF_SUMS_##SUMS(d)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                    \
  }
#define DF_WGMMA(T, NAME)                                                        \
  DF_WGMMA_SHARED(T, NAME, 128, 64, "%64", "%65", "%66")                         \
  DF_WGMMA_REGISTERS(T, NAME, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")  \
  DF_WGMMA_REGISTERS(T, NAME, 48, 24, "%24", "%25", "%26", "%27", "%28", "%29")  \
  DF_WGMMA_REGISTERS(T, NAME, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")  \
  DF_WGMMA_REGISTERS(T, NAME, 80, 40, "%40", "%41", "%42", "%43", "%44", "%45")  \
  DF_WGMMA_REGISTERS(T, NAME, 96, 48, "%48", "%49", "%50", "%51", "%52", "%53")  \
  DF_WGMMA_REGISTERS(T, NAME, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69") \
  DF_WGMMA_REGISTERS(T, NAME, 160, 80, "%80", "%81", "%82", "%83", "%84", "%85")
DF_WGMMA(Bfloat16, "bf16")
DF_WGMMA(Half, "f16")

#undef DF_WGMMA
#undef DF_WGMMA_REGISTERS
#undef DF_WGMMA_SHARED
#undef DF_NAMES_16
#undef DF_NAMES_24
#undef DF_NAMES_32
#undef DF_NAMES_40
#undef DF_NAMES_48
#undef DF_NAMES_64
#undef DF_NAMES_80
#undef DF_EIGHT
#undef DF_SUMS_16
#undef DF_SUMS_24
#undef DF_SUMS_32
#undef DF_SUMS_40
#undef DF_SUMS_48
#undef DF_SUMS_64
#undef DF_SUMS_80

// ---- host
// Why this kernel, compiled with launch bounds of `threads` for sm_90a alone, cannot run on the
// current device; or nullptr.
inline const char* without_hopper(const void* kernel, int threads) {
  int device = 0, major = 0, minor = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (major != 9 || minor != 0) return "the Hopper kernel needs an sm_90 GPU";
  cudaFuncAttributes attributes;
  e = cudaFuncGetAttributes(&attributes, kernel);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (attributes.maxThreadsPerBlock < threads)
    return "this library was built without sm_90a, which the Hopper kernel needs";
  return nullptr;
}

// Describes a tensor to the copy engine; nullptr, or why it cannot. The driver's function is looked
// up at run time, so that nothing links against libcuda.
template <typename T>
const char* encode(TensorMap* map, const BoxedTensor& t) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                alignof(TensorMap) >= alignof(CUtensorMap));
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                         cudaEnableDefault, &found);
#else
  const cudaError_t e =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (found != cudaDriverEntryPointSuccess)
    return "the driver is too old for tensor maps (CUDA 12.0)";
  constexpr bool kIsHalf = std::is_same_v<T, Half>;
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(t.box_columns),
                             static_cast<cuuint32_t>(t.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const cuuint64_t size[4] = {t.size[0], t.size[1], t.size[2], t.size[3]},
                   stride[3] = {t.stride[0], t.stride[1], t.stride[2]};
  const int bytes = t.box_columns * 2;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      reinterpret_cast<CUtensorMap*>(map),
      kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      const_cast<void*>(t.base), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
      : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                    : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS
             ? nullptr
             : "the copy engine cannot read q, k or v with these sizes and strides";
}

}  // namespace diffusion_fast::ptx
