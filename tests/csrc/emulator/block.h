// One thread block on the host: threads are fibers, warp collectives and barriers are rendezvous.
//
// The last thread to arrive at a collective computes it for all. Threads that meet at different
// lines are a divergence, no thread left to run is a deadlock; both name their source lines. With a
// seed other than 0 warps and lanes interleave in a seeded random order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "clocks.h"
#include "fiber.h"

// The source line of a call, as the last two parameters of every emulated instruction.
#define DIFFUSION_FAST_AT int line = __builtin_LINE()

namespace diffusion_fast::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Options {
  uint64_t seed = 0;
  bool races = true;
};

struct Report {
  std::vector<std::string> errors;
  uint64_t mma = 0, ldmatrix = 0, cp_async = 0, bank_conflicts = 0;
  uint64_t blocks = 0, shared_bytes = 0;  // of the last launch
};

struct AsyncCopy {
  uint32_t to;
  const void* from;
  bool valid;
  int group;
};

struct Thread {
  Fiber fiber;
  Index index;
  int id = 0, lane = 0, warp = 0, line = 0;
  const char* at = "start";
  bool done = false;
  std::vector<AsyncCopy> copies;
  int groups = 0;                  // committed so far
  std::vector<uint32_t> unfenced;  // words
};

struct Warp {
  uint32_t ready = ~0u;  // bit per lane
  uint32_t epoch = 0;    // counts __syncwarp
  int arrived = 0, op = 0, line = 0;
  void* argument[32] = {};
};

// What was last done to a 4-byte word of shared memory, for the race check.
struct Access {
  enum Kind : uint8_t { kNone, kDone, kInFlight, kOneThread, kOneWarp, kMany };
  uint32_t block_epoch = 0, warp_epoch = 0;
  int16_t thread = 0;
  Kind kind = kNone;
  uint16_t line = 0;
};
struct Word {
  Access write, read;
  bool unfenced = false;  // written by an ordinary store that no proxy fence followed
};

// What the instructions of sm_90a keep about the block that runs (barriers.h, wgmma.h).
struct Asynchronous {
  virtual ~Asynchronous() = default;
  virtual bool deliver() = 0;  // lets one copy land; false where none is on its way
  virtual void before_write(uint32_t address, uint32_t bytes, const Thread& thread, int line) = 0;
  virtual void leave(const Thread& thread) = 0;
  virtual void end() = 0;
};

struct Block {
  Options options;
  Report* report = nullptr;
  Index index, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::vector<Word> words;
  std::unique_ptr<Stacks> stacks;
  Clocks clocks;
  std::unique_ptr<Asynchronous> asynchronous;
  std::function<void()> body;
  Fiber host;
  Thread* current = nullptr;
  uint32_t epoch = 1;  // counts __syncthreads
  int arrived = 0, barrier_line = 0, live = 0;
  bool aborted = false;
  uint64_t random_state = 0;
  std::set<std::string> seen;

  uint64_t random() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
  }
  void note(const std::string& kind, const std::string& details = "") {  // each kind once
    constexpr size_t kShown = 16;
    if (!seen.insert(kind).second || report->errors.size() >= kShown) return;
    report->errors.push_back("block " + std::to_string(index.x) + ": " + kind + details);
  }
};

inline Block* block = nullptr;  // the block that runs; one at a time

inline std::vector<int> lanes_of(int warp) {
  std::vector<int> threads(32);
  for (int i = 0; i < 32; ++i) threads[i] = warp * 32 + i;
  return threads;
}

inline std::string where(const Thread& t) {
  return "thread " + std::to_string(t.id) + " at line " + std::to_string(t.line) + " (" + t.at +
         ")";
}

[[noreturn]] inline void fail(const std::string& why) {
  block->note(why);
  block->aborted = true;
  block->current->fiber.jump_to(block->host);
  abort();
}

inline Thread* ready_thread() {
  Block& b = *block;
  const int warps = static_cast<int>(b.warps.size());
  const bool shuffle = b.options.seed != 0;
  int w = b.current->warp;
  if (shuffle && b.random() % 8 == 0) w = static_cast<int>(b.random() % warps);
  for (int i = 0; i < warps; ++i, w = (w + 1) % warps) {
    const uint32_t ready = b.warps[w].ready;
    if (ready == 0) continue;
    const int skip = shuffle ? static_cast<int>(b.random() & 31) : 0;
    const uint32_t rotated = skip ? ready >> skip | ready << (32 - skip) : ready;
    return &b.threads[w * 32 + ((__builtin_ctz(rotated) + skip) & 31)];
  }
  return nullptr;
}

inline Thread* next_thread() {
  Thread* next = ready_thread();
  while (next == nullptr && block->asynchronous != nullptr && block->asynchronous->deliver())
    next = ready_thread();
  return next;
}

inline void sleep() {
  Thread& me = *block->current;
  block->warps[me.warp].ready &= ~(1u << me.lane);
}
inline void wake(const Thread& t) { block->warps[t.warp].ready |= 1u << t.lane; }

// Runs another thread, or the host where none is ready (all done, or a deadlock).
inline void reschedule() {
  Thread& me = *block->current;
  Thread* next = next_thread();
  if (next == &me) return;
  if (next == nullptr) {
    me.fiber.jump_to(block->host);
  } else {
    block->current = next;
    me.fiber.jump_to(next->fiber);
  }
}

inline void thread_main() {
  block->body();
  Thread& me = *block->current;
  me.done = true;
  me.at = "exited";
  --block->live;
  block->warps[me.warp].ready &= ~(1u << me.lane);
  if (!me.copies.empty()) block->note("a thread exits with cp.async in flight");
  if (block->asynchronous != nullptr) block->asynchronous->leave(me);
  reschedule();
  abort();
}

// Warp collective `op`: `execute(warp, arguments)` runs once, when all 32 lanes have come.
template <class Execute>
void warp_collective(int op, void* argument, const char* what, int line, Execute execute) {
  Thread& me = *block->current;
  Warp& w = block->warps[me.warp];
  me.at = what;
  me.line = line;
  if (w.arrived == 0) {
    w.op = op;
    w.line = line;
  } else if (w.op != op || w.line != line) {
    fail("divergent warp: " + where(me) + " against line " + std::to_string(w.line));
  }
  w.argument[me.lane] = argument;
  if (++w.arrived < 32) {
    w.ready &= ~(1u << me.lane);
    reschedule();
    return;
  }
  w.arrived = 0;
  execute(w, w.argument);
  w.ready = ~0u;
}

inline void block_barrier(int line) {
  Block& b = *block;
  Thread& me = *b.current;
  me.at = "__syncthreads";
  me.line = line;
  if (b.arrived == 0) b.barrier_line = line;
  if (b.barrier_line != line)
    fail("__syncthreads at two lines: " + where(me) + " against line " +
         std::to_string(b.barrier_line));
  if (++b.arrived < static_cast<int>(b.threads.size())) {
    b.warps[me.warp].ready &= ~(1u << me.lane);
    reschedule();
    return;
  }
  b.arrived = 0;
  ++b.epoch;
  if (b.clocks.on()) {
    std::vector<int> all(b.threads.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
    b.clocks.meet(all);
  }
  for (Warp& w : b.warps) w.ready = ~0u;
}

inline void run_block(Block& b, int threads) {
  constexpr uint8_t kPoison = 0xff;  // a NaN in every floating-point type
  if (!b.stacks || b.stacks->count() < threads) b.stacks = std::make_unique<Stacks>(threads);
  std::fill(b.shared.begin(), b.shared.end(), kPoison);
  std::fill(b.words.begin(), b.words.end(), Word{});
  b.threads.assign(threads, Thread{});
  b.warps.assign(threads / 32, Warp{});
  b.epoch = 1;
  b.arrived = 0;
  b.live = threads;
  b.aborted = false;
  b.clocks.stop();
  b.asynchronous.reset();
  b.random_state = (b.options.seed + 1) * 0x9e3779b97f4a7c15ull + b.index.x * 0x2545f4914f6cdd1dull;
  for (int i = 0; i < threads; ++i) {
    Thread& t = b.threads[i];
    t.index = {static_cast<unsigned>(i), 0, 0};
    t.id = i;
    t.lane = i % 32;
    t.warp = i / 32;
    t.fiber.start(b.stacks->stack(i), Stacks::usable(), thread_main);
  }
  block = &b;
  b.current = &b.threads[0];
  b.host.jump_to(b.current->fiber);
  if (!b.aborted && b.live > 0) {
    std::string waiting;
    int shown = 0;
    for (const Thread& t : b.threads)
      if (!t.done && shown++ < 2) waiting += " " + where(t);
    b.note("deadlock:", waiting);
  }
  if (!b.aborted && b.asynchronous != nullptr) b.asynchronous->end();
  block = nullptr;
}

}  // namespace diffusion_fast::emulator
