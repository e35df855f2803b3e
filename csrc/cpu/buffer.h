// Numbers that begin where a cache line does: a vector or a tile's row that crosses one costs
// several.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace {

template <class T>
struct OnLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  OnLines() = default;
  template <class U>
  OnLines(const OnLines<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kLine));
  }
  void deallocate(T* at, std::size_t) { ::operator delete(at, kLine); }
  template <class U>
  bool operator==(const OnLines<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const OnLines<U>&) const {
    return false;
  }
};

template <class T>
using Buffer = std::vector<T, OnLines<T>>;

// The same for float32 that nobody has set yet.
struct Release {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float[], Release>;

inline Memory allocate(long count) { return Memory(new (std::align_val_t(64)) float[count]); }

// What a thread of a parallel region works with. No exception may leave a region: memory that is
// not to be had is noted, and after a barrier no thread goes on.
template <class T>
struct Own : std::optional<T> {
  template <class... From>
  explicit Own(std::atomic<bool>& failed, const From&... from) {
    try {
      this->emplace(from...);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  }
};

inline void check(const std::atomic<bool>& failed) {
  if (failed) throw std::bad_alloc();
}

// Runs what may throw, for Python: whether there was too little memory.
template <class Body>
int out_of_memory(Body body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
