// What the library tells about itself, through C functions that info.cpp looks up by name.
#pragma once

namespace diffusion_fast {

struct KernelReport {
  char name[64];
  int threads, dynamic_shared_bytes;  // of a launch; the largest one for short-key kernels
  int registers, static_shared_bytes, local_bytes, blocks_per_multiprocessor, binary_version;
};

}  // namespace diffusion_fast

extern "C" {
// JSON: head dims, architectures, compilers.
__attribute__((visibility("default"))) const char* diffusion_fast_build();
// Fills up to `capacity` reports for the current device; the number of kernels, or -1 and *error.
__attribute__((visibility("default"))) int diffusion_fast_kernels(
    diffusion_fast::KernelReport* reports, int capacity, const char** error);
}
