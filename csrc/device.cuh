// Every device-only instruction the kernels use, wrapped once, and the launch of a kernel.
//
// The `#if` below is the only one that tells nvcc from g++: under nvcc each name is one PTX
// instruction, under g++ the same name comes from the emulator and the kernels run on the host
// (tests/csrc/emulator/README.md). Kernels therefore use nothing device-only but these names,
// threadIdx, blockIdx, gridDim, __syncthreads, __syncwarp, __shfl_xor_sync and the C mathematics
// functions; shared memory is 32-bit addresses, never pointers.
#pragma once
#include <cstdint>

namespace diffusion_fast {

// 16-bit floats as bits: the kernels convert with the instructions below and need no CUDA type
// headers.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// A tensor [batch, head, row, column] of 16-bit values, innermost last, which the copy engine reads
// in boxes of one head. In shared memory a box is `box_rows` rows of 2 `box_columns` = 32, 64 or
// 128 bytes, swizzled over that span.
struct BoxedTensor {
  const void* base;
  uint64_t size[4];    // columns, rows, heads, batch
  uint64_t stride[3];  // bytes: of rows, heads, batch; multiples of 16 below 2^40
  int box_columns, box_rows;
};
// What the driver makes of it, a kernel parameter (CUtensorMap).
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

}  // namespace diffusion_fast

#if !defined(__CUDACC__)
#include "emulator/instructions.h"  // IWYU pragma: export
#else
#include <cuda_runtime.h>

namespace diffusion_fast::ptx {

extern __shared__ __align__(128) unsigned char dynamic_shared[];

__device__ __forceinline__ uint32_t shared_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

// ---- asynchronous copies, 16 bytes each. `valid == false` fills with zeros and leaves the source
// unread.
__device__ __forceinline__ void cp_async16(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- plain shared memory
__device__ __forceinline__ void store_shared32(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_float(uint32_t to, float value) {
  store_shared32(to, __float_as_uint(value));
}
__device__ __forceinline__ float2 load_shared_float2(uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared128(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// ---- ldmatrix: 8x8 blocks of 16-bit values; lane i gives the address of row i % 8 of block i / 8
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from)
               : "memory");
}

// ---- mma: d (16x8, float) += a (16xK) b (Kx8). Pure functions of registers, so not volatile: the
// compiler may move them.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b0);

#define DIFFUSION_FAST_MMA(T, NAME)                                                      \
  template <>                                                                            \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4], \
                                                  uint32_t b0, uint32_t b1) {            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                           \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                 \
  }                                                                                      \
  template <>                                                                            \
  __device__ __forceinline__ void mma_m16n8k8<T>(float (&d)[4], const uint32_t (&a)[2],  \
                                                 uint32_t b0) {                          \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                            \
        ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"                              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(b0));                                                \
  }
DIFFUSION_FAST_MMA(Bfloat16, "bf16")
DIFFUSION_FAST_MMA(Half, "f16")
#undef DIFFUSION_FAST_MMA

// ---- conversions and mathematics. pack: `low` in the low half of the word, round to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <typename T>
__device__ __forceinline__ float to_float(uint16_t bits);
template <>
__device__ __forceinline__ float to_float<Bfloat16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <>
__device__ __forceinline__ float to_float<Half>(uint16_t bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
__device__ __forceinline__ float exp2_approximate(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
// The larger one; NaN if either is NaN, where fmaxf returns the other.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}

// Lets the kernel ask for as much dynamic shared memory as the current device has. Always the same
// number: calls with different sizes, on other threads or in a captured graph, cannot take it from
// one another.
inline cudaError_t opt_in_to_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return e == cudaSuccess
             ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)
             : e;
}

// Launches on the current device; nullptr, or the reason it did not start. `stream` is a
// cudaStream_t. Errors are what the calls return, never cudaGetLastError: that may be left over
// from another call.
template <typename Params>
const char* launch(void (*kernel)(Params), unsigned blocks, int threads, int shared_bytes,
                   const Params& params, void* stream) {
  constexpr int kWithoutOptIn = 48 << 10;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t e = shared_bytes > kWithoutOptIn ? opt_in_to_shared_memory(function) : cudaSuccess;
  void* arguments[] = {const_cast<Params*>(&params)};
  if (e == cudaSuccess)
    e = cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream));
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace diffusion_fast::ptx

#include "hopper.cuh"  // IWYU pragma: export
#endif
