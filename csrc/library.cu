// What needs the CUDA runtime but no kernel: the device's limits, and the report about this build.
#include "library.h"

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "report.h"

#define DIFFUSION_FAST_TEXT_(...) #__VA_ARGS__
#define DIFFUSION_FAST_TEXT(...) DIFFUSION_FAST_TEXT_(__VA_ARGS__)

namespace diffusion_fast {

const char* device_limits(int device, DeviceLimits* limits) {
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&limits->multiprocessors, cudaDevAttrMultiProcessorCount},
                {&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&limits->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor}};
  for (const auto& w : wanted) {
    const cudaError_t e = cudaDeviceGetAttribute(w.value, w.attribute, device);
    if (e != cudaSuccess) return cudaGetErrorString(e);
  }
  return nullptr;
}

namespace {

const AttentionEntry* const kEntries[] = {
#define DIFFUSION_FAST_ADDRESS(D) &attention_##D,
    DIFFUSION_FAST_HEAD_DIMS(DIFFUSION_FAST_ADDRESS)
#undef DIFFUSION_FAST_ADDRESS
};

cudaError_t describe(const KernelInfo& kernel, KernelReport* report) {
  cudaFuncAttributes a;
  cudaError_t e = cudaFuncGetAttributes(&a, kernel.function);
  if (e != cudaSuccess) return e;
  *report = {{},
             kernel.threads,
             kernel.shared_bytes,
             a.numRegs,
             static_cast<int>(a.sharedSizeBytes),
             static_cast<int>(a.localSizeBytes),
             0,
             a.binaryVersion};
  for (int i = 0; kernel.name[i] != 0; ++i) report->name[i] = kernel.name[i];
  e = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           kernel.shared_bytes);
  if (e != cudaSuccess) {  // more than this card has: no block of it can run here
    cudaGetLastError();
    return cudaSuccess;
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &report->blocks_per_multiprocessor, kernel.function, kernel.threads, kernel.shared_bytes);
}

}  // namespace
}  // namespace diffusion_fast

// For whoever looks into the file: opening it would register its ops, which a process can do once.
extern "C" __attribute__((visibility("default"), used)) const char diffusion_fast_architectures[] =
    "diffusion_fast architectures: " DIFFUSION_FAST_TEXT(__CUDA_ARCH_LIST__) ";";

extern "C" const char* diffusion_fast_build() {
#define DIFFUSION_FAST_NUMBER(D) #D ","
  static const std::string text = [] {
    std::string head_dims = DIFFUSION_FAST_HEAD_DIMS(DIFFUSION_FAST_NUMBER);
    head_dims.pop_back();
    return "{\"head_dims\": [" + head_dims +
           "], \"architectures\": [" DIFFUSION_FAST_TEXT(__CUDA_ARCH_LIST__) "], \"nvcc\": \"" +
           std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) +
           "\", \"compiler\": \"" __VERSION__ "\"}";
  }();
#undef DIFFUSION_FAST_NUMBER
  return text.c_str();
}

extern "C" int diffusion_fast_kernels(diffusion_fast::KernelReport* reports, int capacity,
                                      const char** error) {
  using namespace diffusion_fast;
  int count = 0;
  for (const AttentionEntry* entry : kEntries) {
    std::vector<KernelInfo> kernels(entry->kernels(nullptr, 0));
    entry->kernels(kernels.data(), static_cast<int>(kernels.size()));
    for (const KernelInfo& kernel : kernels) {
      if (count < capacity) {
        const cudaError_t e = describe(kernel, reports + count);
        if (e != cudaSuccess) {
          *error = cudaGetErrorString(e);
          return -1;
        }
      }
      ++count;
    }
  }
  return count;
}
