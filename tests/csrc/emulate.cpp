// Runs one call of the kernels on the emulator: `emulate REQUEST`, a text file of lines
//
//   set NAME VALUE
//   tensor NAME FILE OFFSET BATCH ROW HEAD
//
// The first sets a number of the call (only_plan: print its plan, run nothing), the second gives
// raw bytes, the offset of element 0 in bytes and strides in elements.
//
// Tensors are written back to their files. Each lies against an unmapped page, so that access past
// its end ends the process. Prints the emulator's report: `stat NAME VALUE` and `error TEXT` lines;
// exits 1 on an error.
#include <sys/mman.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <map>

#include "device.cuh"
#include "emulate.h"

namespace diffusion_fast {
namespace {

struct Tensor {
  std::string file;
  uint8_t* memory = nullptr;
  size_t size = 0;
  int64_t offset = 0;
  Strides strides{};
  template <typename T>
  T* data() const {
    return memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + offset);
  }
};

uint8_t* guarded_copy(const std::vector<char>& bytes) {
  constexpr size_t kPage = 4096, kAlignment = 16;
  const size_t kept = (bytes.size() + kAlignment - 1) / kAlignment * kAlignment,
               mapped = (kept + kPage - 1) / kPage * kPage;
  auto* base = static_cast<uint8_t*>(mmap(nullptr, mapped + 2 * kPage, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + mapped, kPage, PROT_NONE);
  uint8_t* at = base + kPage + mapped - kept;
  memcpy(at, bytes.data(), bytes.size());
  return at;
}

struct Request {
  std::map<std::string, double> number;
  std::map<std::string, Tensor> tensor;

  explicit Request(const char* path) {
    std::ifstream in(path);
    std::string kind, name;
    while (in >> kind >> name) {
      if (kind == "set") {
        in >> number[name];
      } else {
        Tensor& t = tensor[name];
        in >> t.file >> t.offset >> t.strides.batch >> t.strides.row >> t.strides.head;
        std::ifstream raw(t.file, std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(raw)), {});
        t.size = bytes.size();
        t.memory = guarded_copy(bytes);
      }
    }
  }
  void write_back() const {
    for (const auto& [name, t] : tensor)
      std::ofstream(t.file, std::ios::binary)
          .write(reinterpret_cast<const char*>(t.memory), static_cast<std::streamsize>(t.size));
  }
  int integer(const std::string& name) const { return static_cast<int>(number.at(name)); }
  Tensor get(const std::string& name) const {
    const auto t = tensor.find(name);
    return t == tensor.end() ? Tensor{} : t->second;
  }
};

template <typename Params>
Params common(const Request& r) {
  Params p{};
  p.q = r.get("q").data<void>();
  p.k = r.get("k").data<void>();
  p.v = r.get("v").data<void>();
  p.out = r.get("out").data<void>();
  p.lse = r.get("lse").data<float>();
  p.bias = r.get("bias").data<float>();
  p.bias_batch = r.get("bias").strides.batch;
  p.bias_head = r.get("bias").strides.head;
  p.key_lengths = r.get("key_lengths").data<int>();
  p.q_strides = r.get("q").strides;
  p.k_strides = r.get("k").strides;
  p.v_strides = r.get("v").strides;
  p.out_strides = r.get("out").strides;
  p.batch = r.integer("batch");
  p.heads = r.integer("heads");
  p.queries = r.integer("queries");
  p.keys = r.integer("keys");
  p.scale = static_cast<float>(r.number.at("scale"));
  return p;
}

const char* run(const Request& r, const DeviceLimits& device) {
  if (r.integer("backward") == 0)
    return emulate_forward(common<ForwardParams>(r),
                           static_cast<ForwardKernel>(r.integer("kernel")), device);
  auto p = common<BackwardParams>(r);
  p.splits = r.integer("splits");
  p.dout = r.get("dout").data<void>();
  p.dq = r.get("dq").data<void>();
  p.dk = r.get("dk").data<void>();
  p.dv = r.get("dv").data<void>();
  p.delta = r.get("delta").data<float>();
  p.dk_parts = r.get("dk_parts").data<float>();
  p.dv_parts = r.get("dv_parts").data<float>();
  p.dbias_parts = r.get("dbias_parts").data<float>();
  p.dout_strides = r.get("dout").strides;
  p.dq_strides = r.get("dq").strides;
  p.dk_strides = r.get("dk").strides;
  p.dv_strides = r.get("dv").strides;
  return emulate_backward(p);
}

}  // namespace
}  // namespace diffusion_fast

int main(int, char** arguments) {
  using namespace diffusion_fast;
  const Request request(arguments[1]);
  emulator::options.seed = static_cast<uint64_t>(request.integer("seed"));
  const DeviceLimits device{request.integer("multiprocessors"), request.integer("shared_per_block"),
                            request.integer("shared_per_multiprocessor")};
  if (request.number.count("only_plan") != 0) {
    std::cout << "stat splits "
              << emulate_splits(request.integer("batch") * request.integer("heads"),
                                request.integer("queries"), request.integer("keys"), device)
              << "\n";
    return 0;
  }
  const char* refused = run(request, device);
  request.write_back();
  const emulator::Report& report = emulator::report;
  std::cout << "stat mma " << report.mma << "\nstat ldmatrix " << report.ldmatrix
            << "\nstat cp_async " << report.cp_async << "\nstat bank_conflicts "
            << report.bank_conflicts << "\nstat blocks " << report.blocks << "\nstat shared_bytes "
            << report.shared_bytes << "\n";
  if (refused != nullptr) std::cout << "error launch refused: " << refused << "\n";
  for (const std::string& e : report.errors) std::cout << "error " << e << "\n";
  return refused != nullptr || !report.errors.empty();
}
