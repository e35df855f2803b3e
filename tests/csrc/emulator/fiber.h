// A fiber: a stack one can leave and come back to. Hand-written on x86-64 (a ucontext switch costs
// two system calls), ucontext elsewhere.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.weak diffusion_fast_switch
.type diffusion_fast_switch,@function
diffusion_fast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");
extern "C" void diffusion_fast_switch(void** save, void* to);
#else
#include <ucontext.h>
#endif

namespace diffusion_fast::emulator {

class Fiber {
 public:
  // Next jump_to() enters `entry` on the given stack; entry must never return.
  void start(uint8_t* stack, size_t size, void (*entry)()) {
#if defined(__x86_64__)
    // as after a call: 16-byte aligned plus 8
    void** top = reinterpret_cast<void**>(stack + size - 32);
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    stack_pointer_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }
  void jump_to(Fiber& other) {
#if defined(__x86_64__)
    diffusion_fast_switch(&stack_pointer_, other.stack_pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// Stacks, each with an unmapped page below it: an overflow ends the process instead of the
// neighbour.
class Stacks {
 public:
  static constexpr size_t kSize = 128 << 10, kGuard = 4096;
  explicit Stacks(int count) : count_(count) {
    memory_ = static_cast<uint8_t*>(mmap(nullptr, count * kSize, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * kSize, kGuard, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, count_ * kSize); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  uint8_t* stack(int i) { return memory_ + i * kSize + kGuard; }
  static constexpr size_t usable() { return kSize - kGuard; }
  int count() const { return count_; }

 private:
  int count_;
  uint8_t* memory_;
};

}  // namespace diffusion_fast::emulator
