#include "instructions.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr long kAskPermission = 0x1023, kTileData = 18;  // of arch_prctl(2), from Linux 5.16 on

bool finds_pairs() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & 1u << 5;
}

bool finds_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!(edx & bf16) || !(edx & tile)) return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}

}  // namespace

bool pairs_here() {
  static const bool here = finds_pairs();
  return here;
}

bool tiles_here() {
  static const bool here = pairs_here() && finds_tiles();
  return here;
}
