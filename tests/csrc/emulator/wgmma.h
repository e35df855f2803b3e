// wgmma: products that run as late as their wait allows. Each of the four warps of a warpgroup has
// its 16 rows, and waits for itself: that one warp is done says nothing of the others.
//
// Until its wait a product's accumulators are NaN, and touching them or its A registers is an
// error; its operands in shared memory are read then, and writing there is an error. Layouts: PTX
// ISA 9.0, sections 9.7.15.5.1.1 and 9.7.15.5.1.2.
#pragma once
#include "barriers.h"

namespace diffusion_fast::emulator {

// A matrix in shared memory as a descriptor shows it: in chunks of 16 bytes, 8 values along its
// contiguous dim.
struct Matrix {
  uint32_t start, leading, stride, span;
  bool along_k;  // what is contiguous
  explicit Matrix(uint64_t bits, bool k_contiguous)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        along_k(k_contiguous) {
    constexpr uint32_t kSpan[] = {0, 128, 64, 32};
    span = kSpan[bits >> 62];
  }
  // K contiguous: chunk 0 or 1 of row `line`. Else: chunk of columns, `line` being k.
  uint32_t chunk(int line, int chunk) const {
    const uint32_t l = static_cast<uint32_t>(line), c = static_cast<uint32_t>(chunk),
                   per_span = span / 16;
    const uint32_t row = l / 8 * stride + l % 8 * span;
    return swizzled(start + row + (along_k ? c * 16 : c / per_span * leading + c % per_span * 16),
                    span);
  }
};

struct Product {
  float* d[32];
  const uint32_t* a[32];   // registers; nullptr: a_bits
  uint32_t a_then[32][4];  // what they held
  uint64_t a_bits, b_bits;
  bool accumulate;
  int n, line, group;
  uint32_t serial;
  const float* value;  // of each 16-bit pattern
  std::vector<float>
      start;  // [32, n / 2]; empty while an earlier product on the same accumulators is under way
};

class Products : public Barriers {
 public:
  void fence() { mine().fenced = true; }
  void commit() { ++mine().groups; }
  void wait(int pending) {
    WarpState& w = mine();
    while (!w.products.empty() && w.products.front().group < w.groups - pending) {
      Product p = std::move(w.products.front());
      w.products.erase(w.products.begin());
      run(w, p);
      w.done = p.serial;
    }
    w.fenced = false;
    Clocks& clocks = block->clocks;
    const int warp = block->current->warp;
    for (int t : lanes_of(warp)) clocks.of(t)[clocks.products_of(warp)] = w.done;
  }
  using Barriers::wait;

  void issue(Product p) {
    Block& b = *block;
    WarpState& w = mine();
    const int warp = b.current->warp;
    if (!b.clocks.on()) fail("wgmma without an mbarrier in the kernel: not modelled");
    if (!w.fenced)
      b.note("wgmma without wgmma.fence since the last wait: line " + std::to_string(p.line));
    p.serial = ++w.issued;
    p.group = w.groups;
    compare(warp / 4, p);
    bool chained = false;
    for (const Product& other : w.products) chained |= other.d[0] == p.d[0];
    if (!chained) take_accumulators(p);
    for (int lane = 0; lane < 32; ++lane)
      if (p.a[lane] != nullptr) memcpy(p.a_then[lane], p.a[lane], 16);
    if (p.a[0] == nullptr) read(Matrix(p.a_bits, true), warp % 4 * 16, 16, 2, p);
    const Matrix m(p.b_bits, p.a[0] == nullptr);
    read(m, 0, m.along_k ? p.n : 16, m.along_k ? 2 : p.n / 8, p);
    w.products.push_back(std::move(p));
  }
  void before_write(uint32_t address, uint32_t bytes, const Thread& t, int line) override {
    Clocks& clocks = block->clocks;
    const size_t warps = block->warps.size();
    const uint32_t first = (address - kSharedBase) / kGranule,
                   last = (address - kSharedBase + bytes - 1) / kGranule;
    for (uint32_t granule = first; granule <= last; ++granule)
      for (size_t w = 0; w < warps && !readers_.empty(); ++w) {
        const uint32_t serial = readers_[granule * warps + w];
        if (clocks.of(t.id)[clocks.products_of(static_cast<int>(w))] >= serial) continue;
        block->note("write where a wgmma may still read: line " + std::to_string(line),
                    ", warp " + std::to_string(w));
      }
  }
  void leave(const Thread& thread) override {
    if (!warps_[thread.warp].products.empty()) block->note("a thread exits with wgmma in flight");
  }
  void end() override {
    Barriers::end();
    for (const auto& [group, log] : logs_)
      for (int w = 0; w < 4; ++w)
        if (warps_[group * 4 + w].issued != log.size())
          block->note("the warps of a warpgroup issue different numbers of wgmma");
  }

 private:
  static constexpr uint32_t kGranule = 256;
  struct WarpState {
    std::vector<Product> products;
    bool fenced = false;
    int groups = 0;
    uint32_t issued = 0, done = 0;
  };
  struct Issued {
    uint64_t a_bits, b_bits;
    int line;
  };

  WarpState& mine() { return warps_[block->current->warp]; }

  void compare(int group, const Product& p) {
    std::vector<Issued>& log = logs_[group];
    if (p.serial > log.size()) {
      log.push_back({p.a_bits, p.b_bits, p.line});
      return;
    }
    const Issued& first = log[p.serial - 1];
    if (first.line != p.line || first.a_bits != p.a_bits || first.b_bits != p.b_bits)
      fail("the warps of a warpgroup issue different wgmma: lines " + std::to_string(first.line) +
           " and " + std::to_string(p.line));
  }
  static void take_accumulators(Product& p) {
    for (int lane = 0; lane < 32; ++lane) {
      p.start.insert(p.start.end(), p.d[lane], p.d[lane] + p.n / 2);
      memset(p.d[lane], 0xff, p.n * 2);
    }
  }

  // At the issue: every word of the operand was written, seen by this warp, and not by an unfenced
  // store.
  void read(const Matrix& m, int first, int lines, int chunks, const Product& p) {
    Block& b = *block;
    const size_t warps = b.warps.size();
    if (m.span == 0)
      fail("wgmma: operands without a swizzle are not modelled, line " + std::to_string(p.line));
    if (m.start % (8 * m.span) >= (m.along_k ? m.span : 16))
      b.note("wgmma: operand off its swizzle pattern, line " + std::to_string(p.line));
    if (readers_.empty()) readers_.assign((b.shared.size() / kGranule + 1) * warps, 0);
    for (int line = first; line < first + lines; ++line)
      for (int c = 0; c < chunks; ++c) {
        const uint32_t address = m.chunk(line, c);
        shared_at(address, 16, p.line);
        readers_[(address - kSharedBase) / kGranule * warps + b.current->warp] = p.serial;
        for (uint32_t at = address; b.options.races && at < address + 16; at += 4) {
          const Word& word = b.words[(at - kSharedBase) / 4];
          const char* defect = word.write.kind == Access::kNone ? "wgmma of memory never written"
                               : word.write.kind == Access::kInFlight
                                   ? "wgmma while a copy is in flight"
                               : !happens_before(word.write, *b.current) ? "wgmma after write"
                               : word.unfenced ? "wgmma of a store without proxy fence"
                                               : nullptr;
          if (defect != nullptr) note_race(defect, word.write, *b.current, at, p.line);
        }
      }
  }

  static void load(const Matrix& m, int line, int chunk, const float* value, float* to, int step) {
    uint16_t bits[8];
    memcpy(bits, block->shared.data() + (m.chunk(line, chunk) - kSharedBase), 16);
    for (int i = 0; i < 8; ++i) to[i * step] = value[bits[i]];
  }

  void run(WarpState& w, Product& p) {
    constexpr int kMostColumns = 256;
    static float a[16][16], b[16][kMostColumns];
    const int warp = block->current->warp;
    const bool registers = p.a[0] != nullptr;
    const Matrix left(p.a_bits, true), right(p.b_bits, !registers);
    for (int row = 0; row < 16 && !registers; ++row)
      for (int c = 0; c < 2; ++c) load(left, warp % 4 * 16 + row, c, p.value, &a[row][c * 8], 1);
    for (int lane = 0; lane < 32 && registers; ++lane) {
      if (memcmp(p.a_then[lane], p.a[lane], 16) != 0)
        block->note("A registers of a wgmma in flight were overwritten: line " +
                    std::to_string(p.line));
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          a[lane / 4 + r % 2 * 8][lane % 4 * 2 + e + r / 2 * 8] =
              p.value[p.a_then[lane][r] >> 16 * e & 0xffff];
    }
    if (registers)
      for (int k = 0; k < 16; ++k)
        for (int c = 0; c < p.n / 8; ++c) load(right, k, c, p.value, &b[k][c * 8], 1);
    else
      for (int n = 0; n < p.n; ++n)
        for (int c = 0; c < 2; ++c) load(right, n, c, p.value, &b[c * 8][n], kMostColumns);

    Product* next = nullptr;
    for (Product& other : w.products)
      if (next == nullptr && other.d[0] == p.d[0]) next = &other;
    float sums[16][kMostColumns];
    auto each = [&](auto visit) {  // visit(sum, lane, index)
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < p.n / 2; ++i)
          visit(sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2], lane, i);
    };
    bool touched = false;
    each([&](float& sum, int lane, int i) {
      sum = p.accumulate ? p.start[lane * p.n / 2 + i] : 0.f;
      touched |= float_bits(p.d[lane][i]) != 0xffffffffu;
    });
    if (touched)
      block->note("accumulators of a wgmma in flight were written: line " + std::to_string(p.line));
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < p.n; ++n) sums[row][n] += a[row][k] * b[k][n];
    if (next != nullptr) next->start.resize(static_cast<size_t>(32) * p.n / 2);
    each([&](float& sum, int lane, int i) {
      (next == nullptr ? p.d[lane][i] : next->start[lane * p.n / 2 + i]) = sum;
    });
    ++block->report->mma;
  }

  std::map<int, WarpState> warps_;
  std::map<int, std::vector<Issued>> logs_;
  std::vector<uint32_t> readers_;  // [granules, warps]: the last product that reads there
};

inline Products& products() {
  if (block->asynchronous == nullptr) block->asynchronous = std::make_unique<Products>();
  return static_cast<Products&>(*block->asynchronous);
}

}  // namespace diffusion_fast::emulator
