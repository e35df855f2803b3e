"""What the attention kernels cost, known without a GPU: registers, spills, shared memory, blocks
per multiprocessor, and tensor-core work done over work needed.

``python -m benchmarks.tools.attention_resources`` compiles every kernel for every architecture and
writes benchmarks/results/compile/attention.csv; a test holds new builds against it.
"""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from diffusion_fast.ops.cuda import build as extension
from diffusion_fast.ops.cuda.build import HEAD_DIMS

from .occupancy import LIMITS, blocks_per_multiprocessor

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compile" / "attention.csv"
BUILD = ROOT / "build" / "nvcc"
ARCHITECTURES = tuple(LIMITS)

# Prints kernel, head dim, keys (0: any), dynamic shared bytes. Compiled for the host.
SHAPES = r"""
#include "attention/launch.cuh"
#include <cstdio>
using namespace diffusion_fast;
template <int D, int T> void print_short() {
  printf("short %d %d %d\n", D, T * 16, ShortShape<D, T>::shared_bytes(T * 16));
}
template <int D> void print() {
  print_short<D, kShortKeyTiles[0]>();
  print_short<D, kShortKeyTiles[1]>();
  print_short<D, kShortKeyTiles[2]>();
  printf("tiled %d 0 %d\n", D, TiledShape<D>::kShared);
  printf("delta %d 0 0\n", D);
  printf("backward_keys %d 0 %d\n", D, BackwardShape<D>::kSharedKeys);
  printf("backward_queries %d 0 %d\n", D, BackwardShape<D>::kSharedQueries);
  printf("rows %d %d %d\n", D, TiledShape<D>::kRows, TiledShape<D>::kKeys);
}
int main() { PRINT }
"""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. ``keys``: the most a short-key kernel takes; 0 elsewhere."""

    architecture: str
    kernel: str
    type: str
    head_dim: int
    keys: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    blocks_per_multiprocessor: int


@cache
def shapes() -> dict[tuple[str, int, int], int]:
    """Dynamic shared bytes by (kernel, head dim, keys); ("rows", D, query rows) gives key rows."""
    tools = extension.toolchain()
    cxx = "g++" if isinstance(tools, str) else tools.cxx
    source = SHAPES.replace("PRINT", " ".join(f"print<{dim}>();" for dim in HEAD_DIMS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shapes.cpp"
        path.write_text(source)
        command = [
            cxx,
            "-std=c++17",
            "-w",
            f"-I{extension.sources()}",
            f"-I{ROOT / 'tests' / 'csrc'}",
            str(path),
            "-o",
            f"{path}.out",
        ]
        subprocess.run(command, check=True)
        printed = subprocess.run([f"{path}.out"], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in printed.splitlines())
    return {(name, int(dim), int(keys)): int(value) for name, dim, keys, value in rows}


def short_shared_bytes(head_dim: int, keys: int) -> int:
    """Of the short-key kernel: K, V padded to 16 keys, and two buffers of 64 queries."""
    most = shapes()["short", head_dim, 256]
    row = most // (2 * 256 + 128)
    return (2 * math.ceil(keys / 16) * 16 + 128) * row


_ENTRY = re.compile(
    r"Compiling entry function '\w*?attention_(short|tiled|delta|backward_keys|backward_queries)I"
    r"\w*?(Half|Bfloat16)ELi(\d+)E(?:Li(\d+)E)?"
)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


def parse(architecture: str, log: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` printed."""
    found: list[Kernel] = []
    name, frame = None, [0, 0, 0]
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name = match.groups()
        elif match := _FRAME.search(line):
            frame = [int(one) for one in match.groups()]
        elif (match := _USED.search(line)) and name is not None:
            kernel, type_name, head_dim, tiles = name
            keys = 16 * int(tiles or 0)
            shared = shapes()[kernel, int(head_dim), keys]
            registers = int(match[1])
            blocks = blocks_per_multiprocessor(architecture, registers, shared)
            found.append(
                Kernel(
                    architecture,
                    kernel,
                    {"Half": "fp16", "Bfloat16": "bf16"}[type_name],
                    int(head_dim),
                    keys,
                    registers,
                    stack_bytes=frame[0],
                    spill_store_bytes=frame[1],
                    spill_load_bytes=frame[2],
                    shared_bytes=shared,
                    blocks_per_multiprocessor=blocks,
                )
            )
            name = None
    return found


def compile_kernels(head_dim: int, architecture: str) -> list[Kernel]:
    """Compiles one head dim for one architecture; the log is kept under build/nvcc."""
    tools = extension.toolchain()
    if isinstance(tools, str):
        raise extension.BuildError(tools)
    key = extension._key(extension.COMMON_FLAGS, tools.version, "verbose")
    log = BUILD / f"attention_{head_dim}_{architecture}_{key}.log"
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        source = extension.sources() / "instances" / f"attention_{head_dim}.cu"
        target = f"-arch=sm_{architecture}"
        flags = [*extension.COMMON_FLAGS, "-Xptxas", "-v", "-cubin", target]
        command = [tools.nvcc, *flags, str(source), "-o", f"{log}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise extension.BuildError(f"{' '.join(command)}\n{done.stderr}")
        unfinished = log.with_suffix(".unfinished")
        unfinished.write_text(done.stdout + done.stderr)
        unfinished.rename(log)
    return parse(architecture, log.read_text())


def read_table() -> list[Kernel]:
    with TABLE.open(newline="") as file:
        kinds: dict[str, Any] = {f.name: str if f.type == "str" else int for f in fields(Kernel)}
        return [
            Kernel(**{name: kind(row[name]) for name, kind in kinds.items()})
            for row in csv.DictReader(file)
        ]


def write_table(kernels: Iterable[Kernel]) -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Kernel)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(kernel) for kernel in kernels)


def tensor_core_work(head_dim: int, queries: int, keys: int, short: bool) -> float:
    """Multiply-adds of the forward pass done over needed. 1.0 is no padding."""
    key_step, rows = 16, 64
    if not short:
        rows, key_step = next(
            (n, step)
            for (name, dim, n), step in shapes().items()
            if (name, dim) == ("rows", head_dim)
        )
    padded = math.ceil(queries / rows) * rows * math.ceil(keys / key_step) * key_step
    return padded / (queries * keys)  # the head dim is not padded: m16n8k8 takes the last 8


def main(arguments: Sequence[str]) -> None:
    jobs = int(arguments[0]) if arguments else 2
    cases = [(dim, name) for name in ARCHITECTURES for dim in HEAD_DIMS]
    with ThreadPoolExecutor(jobs) as pool:
        compiled = pool.map(lambda case: compile_kernels(*case), cases)
        kernels = sorted((k for each in compiled for k in each), key=_order)
    write_table(kernels)
    spilling = [k for k in kernels if k.spill_store_bytes or k.spill_load_bytes]
    print(f"{len(kernels)} kernels, {len(spilling)} with spills: {TABLE}")
    for kernel in spilling:
        print(" ", kernel)


def _order(k: Kernel) -> tuple[int, str, str, int, int]:
    return (ARCHITECTURES.index(k.architecture), k.kernel, k.type, k.head_dim, k.keys)


if __name__ == "__main__":
    main(sys.argv[1:])
