// mbarriers, named barriers and the copy engine (TMA).
//
// A copy poisons its target when issued. It lands when no thread can run otherwise, and with a seed
// at random moments before, in random order.
#pragma once
#include <map>

#include "fragments.h"

namespace diffusion_fast::emulator {

struct Mbarrier {
  int count = 0, pending = 0, phase = 0;  // phase: the one that runs
  int64_t bytes = 0;                      // announced and not yet landed
  bool shown = false;                     // to the copy engine
  std::vector<uint32_t> coming, passed;   // clocks of who arrived in this phase, in the last one
};

struct NamedBarrier {
  int threads = 0;
  std::vector<int> arrived;
};

// What encode() leaves in a TensorMap.
struct EncodedTensor {
  const uint8_t* base;
  uint64_t stride[3];
  uint32_t size[4];
  uint32_t columns, rows;  // of a box
};
static_assert(sizeof(EncodedTensor) <= sizeof(TensorMap));

struct BoxCopy {
  EncodedTensor tensor;
  uint32_t to, barrier;
  int at[4];  // column, row, head, batch
  uint32_t bytes() const { return tensor.columns * 2 * tensor.rows; }
};

// Swizzle over spans of 32, 64 or 128 bytes: the 16-byte chunk within the span takes the xor of the
// address bits from 7 on.
inline uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ (address >> 3 & (span - 16));
}

class Barriers : public Asynchronous {
 public:
  void make(uint32_t address, int count, int line) {
    Block& b = *block;
    shared_at(address, 8, line);
    b.clocks.start(static_cast<int>(b.threads.size()));
    on_write(address, 8, *b.current, line, Access::kDone);
    mbarriers_[address] = {count, count, 0, 0, false, b.clocks.nothing(), b.clocks.nothing()};
  }
  void show() {
    for (auto& [address, m] : mbarriers_) m.shown = true;
  }
  void arrive(uint32_t address, int bytes, int line) {
    Mbarrier& m = find(address, line);
    Clocks& clocks = block->clocks;
    const int me = block->current->id;
    clocks.learn(m.coming.data(), clocks.of(me));
    clocks.tick(me);
    m.bytes += bytes;
    if (--m.pending < 0) fail("mbarrier: too many arrivals, line " + std::to_string(line));
    end_phase(address, m);
  }
  void wait(uint32_t address, int parity, int line) {
    Mbarrier& m = find(address, line);
    Block& b = *block;
    Thread& me = *b.current;
    me.at = "mbarrier wait";
    me.line = line;
    if (b.options.seed != 0 && b.random() % 4 == 0) deliver();
    if ((m.phase & 1) != parity) {
      b.clocks.learn(b.clocks.of(me.id), m.passed.data());
      return;
    }
    waiters_.push_back({me.id, address, parity});
    sleep();
    reschedule();
  }
  void meet(int number, int threads, int line) {
    Block& b = *block;
    Thread& me = *b.current;
    me.at = "named barrier";
    me.line = line;
    if (number < 1 || number > 15 || threads % 32 != 0)
      fail("named barrier: number or threads, line " + std::to_string(line));
    NamedBarrier& barrier = named_[number];
    if (barrier.arrived.empty()) barrier.threads = threads;
    if (barrier.threads != threads)
      fail("named barrier: two numbers of threads, line " + std::to_string(line));
    barrier.arrived.push_back(me.id);
    if (static_cast<int>(barrier.arrived.size()) < threads) {
      sleep();
      reschedule();
      return;
    }
    b.clocks.meet(barrier.arrived);
    for (int t : barrier.arrived) wake(b.threads[t]);
    barrier.arrived.clear();
  }

  void copy(const BoxCopy& c, int line) {
    Block& b = *block;
    const uint32_t span = c.tensor.columns * 2;
    const Mbarrier& m = find(c.barrier, line);
    if (!m.shown)
      b.note("the copy engine has not been shown the mbarrier: line " + std::to_string(line));
    if (c.to % (8 * span) != 0)
      fail("box copy: not at the start of its swizzle pattern, line " + std::to_string(line));
    shared_at(c.to, 16, line);
    shared_at(c.to + c.bytes() - 16, 16, line);
    for (const auto& [address, other] : mbarriers_)
      if (address >= c.to && address < c.to + c.bytes())
        fail("box copy over an mbarrier, line " + std::to_string(line));
    on_write(c.to, c.bytes(), *b.current, line, Access::kInFlight);
    memset(b.shared.data() + (c.to - kSharedBase), 0xff, c.bytes());
    copies_.push_back(c);
    if (b.options.seed != 0 && b.random() % 4 == 0) deliver();
  }
  bool deliver() override {
    if (copies_.empty()) return false;
    Block& b = *block;
    const size_t chosen = b.options.seed != 0 ? b.random() % copies_.size() : copies_.size() - 1;
    const BoxCopy c = copies_[chosen];
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(chosen));
    land_box(c);
    Mbarrier& m = mbarriers_.at(c.barrier);
    m.coming[b.clocks.engine()] = std::max(m.coming[b.clocks.engine()], landed_);
    m.bytes -= c.bytes();
    end_phase(c.barrier, m);
    return true;
  }
  void end() override {
    if (!copies_.empty()) block->note("a block exits with box copies in flight");
    for (const auto& [number, barrier] : named_)
      if (!barrier.arrived.empty()) block->note("a block exits with threads at a named barrier");
  }

 private:
  struct Waiter {
    int thread;
    uint32_t barrier;
    int parity;
  };

  Mbarrier& find(uint32_t address, int line) {
    const auto m = mbarriers_.find(address);
    if (m == mbarriers_.end()) fail("not an mbarrier: line " + std::to_string(line));
    if (block->options.races) {
      const Access& made = block->words[(address - kSharedBase) / 4].write;
      if (!happens_before(made, *block->current))
        note_race("mbarrier used before it was made", made, *block->current, address, line);
    }
    return m->second;
  }
  void end_phase(uint32_t address, Mbarrier& m) {
    if (m.pending != 0 || m.bytes != 0) return;
    Clocks& clocks = block->clocks;
    ++m.phase;
    m.pending = m.count;
    m.passed = m.coming;
    for (size_t i = 0; i < waiters_.size();) {
      const Waiter w = waiters_[i];
      if (w.barrier == address && (m.phase & 1) != w.parity) {
        clocks.learn(clocks.of(w.thread), m.passed.data());
        wake(block->threads[w.thread]);
        waiters_.erase(waiters_.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
  }
  void land_box(const BoxCopy& c) {
    const EncodedTensor& t = c.tensor;
    Block& b = *block;
    ++landed_;
    auto inside = [&](int dim, int64_t at) { return at >= 0 && at < t.size[dim]; };
    for (uint32_t row = 0; row < t.rows; ++row)
      for (uint32_t column = 0; column < t.columns; ++column) {
        uint16_t value = 0;
        const int64_t at_column = int64_t{c.at[0]} + column, at_row = int64_t{c.at[1]} + row;
        if (inside(0, at_column) && inside(1, at_row) && inside(2, c.at[2]) && inside(3, c.at[3]))
          memcpy(&value,
                 t.base + at_row * t.stride[0] + c.at[2] * t.stride[1] + c.at[3] * t.stride[2] +
                     at_column * 2,
                 2);
        const uint32_t to = swizzled(c.to + row * t.columns * 2 + column * 2, t.columns * 2);
        memcpy(b.shared.data() + (to - kSharedBase), &value, 2);
      }
    if (!b.options.races) return;
    for (uint32_t i = 0; i < c.bytes() / 4; ++i) {
      Access& w = b.words[(c.to - kSharedBase) / 4 + i].write;
      w = {landed_, 0, static_cast<int16_t>(b.clocks.engine()), Access::kDone, w.line};
    }
  }

  std::map<uint32_t, Mbarrier> mbarriers_;
  std::map<int, NamedBarrier> named_;
  std::vector<Waiter> waiters_;
  std::vector<BoxCopy> copies_;
  uint32_t landed_ = 0;
};

}  // namespace diffusion_fast::emulator
