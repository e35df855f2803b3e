"""What a compiled kernel is made of: its instructions, counted, and what a block of it occupies.

The cubin is read with the tools that come with triton, so that neither a GPU nor the CUDA toolkit
is needed. Counts are of instructions in the code, not of executions: a loop's body counts once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# By the first words of their names, as nvdisasm prints them.
PRODUCTS = {
    "hgmma": "HGMMA",  # of a group of warps: Hopper
    "hmma": "HMMA",  # of a warp
    "tcgen05": "UTC.*MMA",  # Blackwell's data center GPUs
}
COLUMNS = (
    *PRODUCTS,
    *("load16", "load8", "load4", "store16", "store8", "store4"),
    *("copy16", "copy4", "tma", "setmaxnreg", "spills"),
)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def lacking() -> list[str]:
    """The tools that this installation of triton doesn't have."""
    return [name for name in ("cuobjdump", "nvdisasm") if not (TOOLS / name).exists()]


def instructions(cubin: bytes) -> dict[str, int]:
    """Counts by :data:`COLUMNS`.

    load, store and copy are accesses of global memory, by the bytes that a thread moves at once (4
    stands for 4 or less); copy goes to shared memory on its own (cp.async). tma are loads and
    stores of whole tiles.
    """
    listing = _run("nvdisasm", "-c", cubin=cubin)
    return count(Counter(_INSTRUCTION.findall(listing)))


def count(names: Counter[str]) -> dict[str, int]:
    """The columns of instructions, from the number of each."""
    found = dict.fromkeys(COLUMNS, 0)
    for name, number in names.items():
        if column := _column(name):
            found[column] += number
    return found


def _column(name: str) -> str | None:
    first, *modifiers = name.split(".")
    for column, pattern in PRODUCTS.items():
        if re.fullmatch(pattern, first):
            return column
    width = 16 if "128" in modifiers else 8 if "64" in modifiers else 4
    if first == "LDGSTS":
        return "copy16" if width == 16 else "copy4"
    if first in ("LDG", "STG"):
        return f"{'load' if first == 'LDG' else 'store'}{width}"
    if first in ("UTMALDG", "UTMASTG", "UTMAREDG"):
        return "tma"
    if first in ("LDL", "STL"):
        return "spills"
    return "setmaxnreg" if first == "USETMAXREG" else None


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory (spills and arrays, in bytes) of a cubin's kernel."""
    text = _run("cuobjdump", "-res-usage", cubin=cubin)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"]}


def _run(tool: str, option: str, *, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
