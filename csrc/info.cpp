// Python module _info: what a built library of kernels is made of. Knows neither torch nor CUDA; it
// asks the library.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "report.h"

namespace py = pybind11;

namespace {

// The library stays loaded: kernels of a library that is closed and opened again would be
// registered twice.
void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("cannot load " + path + ": " + dlerror());
  return library;
}

template <typename Function>
Function find(void* library, const char* name) {
  void* function = dlsym(library, name);
  if (function == nullptr)
    throw std::runtime_error(std::string("not a library of this package: no ") + name);
  return reinterpret_cast<Function>(function);
}

std::string build(const std::string& path) {
  return find<decltype(&diffusion_fast_build)>(open_library(path), "diffusion_fast_build")();
}

std::vector<py::dict> kernels(const std::string& path) {
  const auto list =
      find<decltype(&diffusion_fast_kernels)>(open_library(path), "diffusion_fast_kernels");
  const char* error = "unknown";
  std::vector<diffusion_fast::KernelReport> reports(list(nullptr, 0, &error));
  if (list(reports.data(), static_cast<int>(reports.size()), &error) < 0)
    throw std::runtime_error(std::string("CUDA cannot describe the kernels: ") + error);
  std::vector<py::dict> result;
  for (const auto& r : reports) {
    py::dict d;
    d["name"] = r.name;
    d["threads"] = r.threads;
    d["registers"] = r.registers;
    d["shared_bytes"] = r.dynamic_shared_bytes + r.static_shared_bytes;
    d["local_bytes"] = r.local_bytes;
    d["blocks_per_multiprocessor"] = r.blocks_per_multiprocessor;
    d["architecture"] = r.binary_version;
    result.push_back(std::move(d));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "Build information and resources of the compiled attention kernels.";
  m.def("build", &build, py::arg("path"),
        "JSON: head_dims, architectures (as 800 for sm_80), nvcc, compiler.");
  m.def("kernels", &kernels, py::arg("path"),
        "Per kernel its registers, shared memory and occupancy on the current device. Raises "
        "RuntimeError without a CUDA device.");
}
