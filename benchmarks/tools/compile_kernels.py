"""What the compiler made of every Triton kernel, without a GPU.

    python -m benchmarks.tools.compile_kernels                    # all, into the table
    python -m benchmarks.tools.compile_kernels --arch 90          # of one, to the screen

The launchers themselves run, at the models' shapes, with tensors on the meta device, under every
configuration that would be measured; the JIT compiles what they would launch. A row is a program:
its instructions by kind, what a block occupies, and in ``fault`` what it does slowly although its
shape allows the fast way.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_leaves

from diffusion_fast.kernels import ahead
from diffusion_fast.kernels.ahead import Launch

from . import machine_code
from .launch_cases import cases
from .occupancy import blocks_per_multiprocessor

ARCHITECTURES = (80, 90, 100, 120)
# The one that is looked at closely, at every shape. Of the others, each kernel at some shapes.
CLOSELY = 90
TABLE = Path(__file__).parents[1] / "results" / "compile" / "kernels.csv"
KEY = ("op", "case", "kernel", "tile", "warps", "stages", "arch")
USE = ("registers", "shared", "local", "blocks")
FIELDS = (*KEY, *USE, *machine_code.COLUMNS, "fault")

WIDE = 16  # bytes, the most that a thread moves at once
PRODUCTS = ("_product", "_decoupled_attention")
NORMS = ("group_norm_silu", "layer_norm", "row_statistics")
# Of these, the kernels that walk over a tile of the image, and whether they write one.
WALKS = {
    **dict.fromkeys(("_statistics", "_sums", "_row_statistics"), False),
    **dict.fromkeys(("_normalize", "_layer_norm", "_gradient"), True),
}


def programs(arch: int) -> list[tuple[str, str, Launch]]:
    """The op, the case and a launch of each program; shapes that specialise alike are one."""
    named: list[tuple[str, str, Launch]] = []
    for op, case, call in cases(quick=arch != CLOSELY):
        with ahead.recording(arch) as found:
            call()
        named += [(op, case, one) for one in found]
    chosen = {id(one) for one in ahead.programs([one for *_, one in named], arch)}
    return [entry for entry in named if id(entry[2]) in chosen]


def tile(one: Launch) -> tuple[int, ...]:
    """The sizes of what a program holds, by the names that the kernels give them."""
    return tuple(
        one.options[n] for n in ("M", "N", "K", "S", "R", "ROWS", "BLOCK") if n in one.options
    )


def itemsize(one: Launch) -> int:
    """Bytes of an element of the tensors that the kernel works on; its sums may be wider."""
    tensors = [getattr(value, "base", value) for value in tree_leaves(list(one.args))]
    dtypes = [value.dtype for value in tensors if hasattr(value, "dtype")]
    return min(dtype.itemsize for dtype in dtypes if dtype.is_floating_point)


def fault(op: str, one: Launch, row: dict[str, Any]) -> str:
    """What the program does in a slow way although its shape allows the fast one; nothing: ""."""
    size = itemsize(one)
    # Those with descriptors have 64 rows in any case.
    tall = one.kernel == "_persistent" or (one.kernel in PRODUCTS and one.options["M"] >= 64)
    if tall and size == 2 and row["arch"] == 90 and not row["hgmma"]:
        return "no HGMMA"
    if one.kernel == "_persistent" and not row["tma"]:
        return "no TMA"
    if op not in NORMS or one.kernel not in WALKS:
        return ""
    # What each thread moves, in whole accesses; a tile that has less is not held to it.
    least = math.prod(tile(one)) * size // (WIDE * 32 * row["warps"])
    if row["load16"] + row["copy16"] < least:
        return f"{row['load16'] + row['copy16']} loads of 16 bytes, expected {least}"
    if WALKS[one.kernel] and row["store16"] < least:
        return f"{row['store16']} stores of 16 bytes, expected {least}"
    return ""


def row(entry: tuple[str, str, Launch], arch: int) -> dict[str, Any]:
    """A program's row; the driver of the process is that of the architecture."""
    op, case, one = entry
    compiled = one.warm_up()
    cubin, meta = compiled.asm["cubin"], compiled.metadata
    name = "90a" if arch == 90 else str(arch)
    found: dict[str, Any] = {
        "op": op,
        "case": case,
        "kernel": one.kernel,
        "tile": "x".join(map(str, tile(one))),
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "arch": arch,
        "shared": meta.shared,
        **machine_code.resources(cubin),
        **machine_code.instructions(cubin),
    }
    threads = 32 * found["warps"]
    found["blocks"] = blocks_per_multiprocessor(name, found["registers"], meta.shared, threads)
    return found | {"fault": fault(op, one, found)}


def rows(arch: int, processes: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each program of an architecture, compiled by several processes."""
    chosen = programs(arch)
    with ahead.compilers(arch, len(chosen), processes) as pool:
        yield from pool.map(functools.partial(row, arch=arch), chosen)


def read(file: Path = TABLE) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("compiling needs TRITON_INTERPRET unset")
    if lacking := machine_code.lacking():
        sys.exit(f"reading machine code needs {' and '.join(lacking)} in {machine_code.TOOLS}")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--processes", type=int, help="how many compile, all cores")
    options = parser.parse_args()
    table = TABLE.open("w", newline="") if not options.arch else contextlib.nullcontext(sys.stdout)
    with table as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        for arch in options.arch or ARCHITECTURES:
            for found in rows(arch, options.processes):
                writer.writerow(found)
                stream.flush()


if __name__ == "__main__":
    main()
