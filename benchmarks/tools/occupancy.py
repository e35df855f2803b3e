"""How many blocks of a kernel a multiprocessor holds at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, table of technical specifications)."""

    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


LIMITS = {
    "80": Limits(2048, 32, 164 << 10),
    "90a": Limits(2048, 32, 228 << 10),
    "100": Limits(2048, 32, 228 << 10),
    "120": Limits(1536, 24, 100 << 10),
}
SYSTEM_SHARED = 1 << 10  # per block


def blocks_per_multiprocessor(
    architecture: str, registers: int, shared_bytes: int, threads: int = 128
) -> int:
    """Resident blocks of ``threads`` threads. Registers are given out by 256 per warp."""
    limits = LIMITS[architecture]
    per_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = limits.registers // (per_warp * threads // 32)
    by_shared = limits.shared_bytes // (shared_bytes + SYSTEM_SHARED)
    return min(limits.blocks, limits.threads // threads, by_registers, by_shared)
