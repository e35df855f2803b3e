// Shared memory of the emulated block: bounds, races, asynchronous copies that land late, bank
// conflicts.
//
// Two accesses are ordered when a __syncthreads lies between them, or within one warp a __syncwarp;
// shuffles and mma order nothing. A cp.async poisons its target when issued and writes it at the
// wait that covers it, so that a missing wait shows in the values as well as in the report.
#pragma once
#include <cstring>

#include "block.h"

namespace diffusion_fast::emulator {

constexpr uint32_t kSharedBase = 0x400;  // as on the device, shared addresses do not begin at 0

// Of an access by t now: the count of its __syncthreads, or with clocks its own time.
inline uint32_t stamp(const Thread& t) {
  return block->clocks.on() ? block->clocks.of(t.id)[t.id] : block->epoch;
}

inline bool happens_before(const Access& a, const Thread& t) {
  if (a.thread == t.id) return true;
  if (block->clocks.on()) return block->clocks.of(t.id)[a.thread] >= a.block_epoch;
  if (a.block_epoch != block->epoch) return true;
  return a.thread / 32 == t.warp && a.warp_epoch < block->warps[t.warp].epoch;
}

inline void note_race(const char* how, const Access& earlier, const Thread& t, uint32_t address,
                      int line) {
  block->note(std::string("race, ") + how + ": line " + std::to_string(line) + " against line " +
                  std::to_string(earlier.line),
              " (threads " + std::to_string(t.id) + " and " + std::to_string(earlier.thread) +
                  ", byte " + std::to_string(address - kSharedBase) + ")");
}

inline uint8_t* shared_at(uint32_t address, uint32_t bytes, int line) {
  Block& b = *block;
  if (address < kSharedBase || address % bytes != 0 ||
      address - kSharedBase + bytes > b.shared.size()) {
    b.current->line = line;
    fail("shared address out of range or misaligned: line " + std::to_string(line) + ", byte " +
         std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " +
         std::to_string(b.shared.size()));
  }
  return b.shared.data() + (address - kSharedBase);
}

// With clocks: one thread stands for all readers that it has seen; readers that have not seen each
// other are kMany, which only a __syncthreads orders (counted in warp_epoch).
inline void note_reader(Access& r, const Thread& t, int line) {
  const bool alone = r.kind == Access::kNone || r.warp_epoch != block->epoch ||
                     (r.kind == Access::kOneThread && happens_before(r, t));
  const Access::Kind kind = alone ? Access::kOneThread : Access::kMany;
  r = {stamp(t), block->epoch, static_cast<int16_t>(t.id), kind, static_cast<uint16_t>(line)};
}

inline void on_read(uint32_t address, uint32_t bytes, const Thread& t, int line) {
  Block& b = *block;
  if (!b.options.races) return;
  const uint32_t warp_epoch = b.warps[t.warp].epoch;
  for (uint32_t at = address; at < address + bytes; at += 4) {
    Word& word = b.words[(at - kSharedBase) / 4];
    if (word.write.kind == Access::kNone)
      note_race("read of memory never written", word.write, t, at, line);
    else if (word.write.kind == Access::kInFlight)
      note_race("read while a copy is in flight", word.write, t, at, line);
    else if (!happens_before(word.write, t))
      note_race("read after write", word.write, t, at, line);
    if (b.clocks.on()) {
      note_reader(word.read, t, line);
      continue;
    }
    // The readers since the last write, as few words: one thread, one warp in this warp epoch, or
    // more.
    const Access& r = word.read;
    Access::Kind kind = Access::kOneThread;
    if (r.kind != Access::kNone && r.block_epoch == b.epoch) {
      if (r.kind == Access::kMany || r.thread / 32 != t.warp)
        kind = Access::kMany;
      else if (r.warp_epoch == warp_epoch && (r.kind == Access::kOneWarp || r.thread != t.id))
        kind = Access::kOneWarp;
    }
    word.read = {b.epoch, warp_epoch, static_cast<int16_t>(t.id), kind,
                 static_cast<uint16_t>(line)};
  }
}

inline void on_write(uint32_t address, uint32_t bytes, const Thread& t, int line,
                     Access::Kind kind) {
  Block& b = *block;
  if (!b.options.races) return;
  if (b.asynchronous != nullptr) b.asynchronous->before_write(address, bytes, t, line);
  const uint32_t warp_epoch = b.warps[t.warp].epoch;
  for (uint32_t at = address; at < address + bytes; at += 4) {
    Word& word = b.words[(at - kSharedBase) / 4];
    const Access &w = word.write, &r = word.read;
    if (w.kind == Access::kInFlight)
      note_race("write while a copy is in flight", w, t, at, line);
    else if (w.kind != Access::kNone && !happens_before(w, t))
      note_race("write after write", w, t, at, line);
    if (b.clocks.on()) {
      const bool ordered = r.kind == Access::kNone || r.warp_epoch != b.epoch ||
                           (r.kind == Access::kOneThread && happens_before(r, t));
      if (!ordered) note_race("write after read", r, t, at, line);
    } else if (r.kind != Access::kNone && r.block_epoch == b.epoch) {
      const bool ordered =
          r.kind == Access::kOneThread
              ? happens_before(r, t)
              : r.kind == Access::kOneWarp && r.thread / 32 == t.warp && r.warp_epoch < warp_epoch;
      if (!ordered) note_race("write after read", r, t, at, line);
    }
    word.write = {stamp(t), warp_epoch, static_cast<int16_t>(t.id), kind,
                  static_cast<uint16_t>(line)};
    word.read.kind = Access::kNone;
    word.unfenced = false;
  }
}

// An ordinary store of one word: wgmma and the copy engine see it after a proxy fence only.
inline void on_store(uint32_t address, Thread& t, int line) {
  on_write(address, 4, t, line, Access::kDone);
  if (!block->options.races || !block->clocks.on()) return;
  const uint32_t word = (address - kSharedBase) / 4;
  block->words[word].unfenced = true;
  t.unfenced.push_back(word);
}

// An asynchronous copy becomes visible to the thread that issued it; others still need a barrier.
inline void land(const AsyncCopy& c, const Thread& t) {
  Block& b = *block;
  uint8_t* to = b.shared.data() + (c.to - kSharedBase);
  if (c.valid)
    memcpy(to, c.from, 16);
  else
    memset(to, 0, 16);
  if (!b.options.races) return;
  for (uint32_t i = 0; i < 4; ++i) {
    Access& w = b.words[(c.to - kSharedBase) / 4 + i].write;
    w = {b.epoch, b.warps[t.warp].epoch, static_cast<int16_t>(t.id), Access::kDone, w.line};
  }
}

// One phase of ldmatrix reads 8 rows of 16 bytes; rows in the same 4 of the 32 banks wait for each
// other.
inline void count_bank_conflicts(const uint32_t (&rows)[8]) {
  uint32_t distinct[8][8];
  int count[8] = {}, worst = 1;
  for (uint32_t row : rows) {
    const uint32_t group = row / 16 % 8;
    uint32_t* known = distinct[group];
    if (std::find(known, known + count[group], row) != known + count[group])
      continue;  // the same row is broadcast
    known[count[group]++] = row;
    worst = std::max(worst, count[group]);
  }
  block->report->bank_conflicts += worst - 1;
}

}  // namespace diffusion_fast::emulator
