"""What the compiler makes of each kernel against the table: every column of every program.

`python -m benchmarks.tools.compile_kernels` writes the table anew.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.tools import compile_kernels as audit
from benchmarks.tools import machine_code
from diffusion_fast.kernels.ahead import Launch, MockTensor

ROOT = Path(__file__).parents[2]
KERNELS = {
    "add_noise": {"_rotate"},
    "conv2d": {"_product", "_reduce"},
    "decoupled_attention": {"_decoupled_attention"},
    "geglu": {"_geglu", "_gradient"},
    "group_norm_silu": {"_statistics", "_normalize", "_sums", "_gradient", "_parameters"},
    "layer_norm": {"_layer_norm", "_gradient", "_add_stripes"},
    "linear": {"_product", "_reduce"},
    "residual": {"_residual", "_sums", "_dbias"},
    "row_statistics": {"_row_statistics"},
    "sampler_step": {"_deviations", "_sampler_step"},
    "weighted_mse": {"_pieces", "_total", "_gradient", "_weight_gradient"},
}


def compiled(arch: str) -> list[dict[str, str]]:
    """In a process of its own: this one's triton may be the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.tools.compile_kernels", "--arch", arch]
    command += ["--processes", "1"]  # the tests themselves run on every core
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    return list(csv.DictReader(run.stdout.splitlines()))


def pinned() -> str:
    """The version of triton that the table is of."""
    found = re.search(r'"triton==([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1]


def test_the_table_covers_every_kernel_and_architecture() -> None:
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in audit.read():
        seen[row["arch"]][row["op"]].add(row["kernel"])
    assert set(seen) == {"80", "90", "100", "120"}
    for arch, ops in seen.items():
        by_descriptors = {"_persistent"} if arch == "90" else set()
        products = {op: KERNELS[op] | by_descriptors for op in ("conv2d", "linear")}
        assert ops == KERNELS | products, arch


def test_no_program_does_slowly_what_its_shape_allows_to_do_fast() -> None:
    assert [row for row in audit.read() if row["fault"]] == []


def test_products_of_16_bits_are_those_of_hopper() -> None:
    rows = [row for row in audit.read() if row["kernel"] == "_product" and row["arch"] == "90"]
    half = [row for row in rows if "float32" not in row["case"]]
    assert len(half) >= 20
    assert all(int(row["hgmma"]) and not int(row["hmma"]) for row in half)


@pytest.mark.parametrize("kernel", ["_statistics", "_normalize", "_layer_norm"])
def test_norms_of_the_models_read_16_bytes_at_once(kernel: str) -> None:
    """A run of several groups of 10 channels does, a group alone would read 4 bytes."""
    rows = [row for row in audit.read() if row["kernel"] == kernel and "NCHW" not in row["case"]]
    assert {row["arch"] for row in rows} == {"80", "90", "100", "120"}
    for row in rows:
        assert int(row["load16"]) + int(row["copy16"]) >= 2, row
        assert not int(row["load4"]), row


def test_heads_of_any_width_are_read_and_written_16_bytes_at_once() -> None:
    """Those of 40 channels too, whose offsets are multiples of 8."""
    rows = [row for row in audit.read() if row["kernel"] == "_decoupled_attention"]
    assert {row["arch"] for row in rows} == {"80", "90", "100", "120"}
    for row in rows:
        assert int(row["copy16"]) >= 4, row
        assert int(row["store16"]) >= 4, row
        assert not int(row["copy4"]) + int(row["store8"]) + int(row["store4"]), row


def test_nothing_spills_on_hopper() -> None:
    assert [row for row in audit.read() if row["arch"] == "90" and int(row["spills"])] == []


def test_no_more_shared_memory_than_a_gpu_has() -> None:
    """That of a consumer GPU; only what is for Hopper alone has all of Hopper's."""
    for row in audit.read():
        assert int(row["blocks"]) >= 1, row
        most = 227 if row["kernel"] == "_persistent" else 99
        assert int(row["shared"]) <= most * 1024, row


def launch_of(kernel: str, dtype: torch.dtype, **options: int) -> Launch:
    sums = MockTensor(torch.float32)
    return Launch("a.module", kernel, (sums, (MockTensor(dtype), None)), options)


def row_of(**counts: int) -> dict[str, Any]:
    return dict.fromkeys(machine_code.COLUMNS, 0) | {"arch": 90, "warps": 4} | counts


PRODUCT = {"M": 128, "N": 64, "K": 64}
NORM = {"S": 32, "R": 128}  # 4096 elements: 4 accesses of 16 bytes for each of 128 threads


@pytest.mark.parametrize(
    ("op", "one", "row", "fault"),
    [
        ("linear", launch_of("_product", torch.bfloat16, **PRODUCT), row_of(hmma=8), "no HGMMA"),
        ("linear", launch_of("_product", torch.float16, **PRODUCT), row_of(hmma=8), "no HGMMA"),
        ("linear", launch_of("_product", torch.bfloat16, **PRODUCT), row_of(hgmma=4), ""),
        ("linear", launch_of("_persistent", torch.bfloat16, N=64), row_of(tma=4), "no HGMMA"),
        ("linear", launch_of("_persistent", torch.bfloat16, N=64), row_of(hgmma=4), "no TMA"),
        ("linear", launch_of("_persistent", torch.bfloat16, N=64), row_of(hgmma=4, tma=2), ""),
        ("linear", launch_of("_product", torch.bfloat16, **PRODUCT), row_of(arch=80), ""),
        ("linear", launch_of("_product", torch.float32, **PRODUCT), row_of(hmma=8), ""),
        ("linear", launch_of("_product", torch.bfloat16, **PRODUCT | {"M": 32}), row_of(), ""),
        (
            "decoupled_attention",
            launch_of("_decoupled_attention", torch.bfloat16, **PRODUCT),
            row_of(hmma=8),
            "no HGMMA",
        ),
        (
            "group_norm_silu",
            launch_of("_statistics", torch.bfloat16, **NORM),
            row_of(load16=3, load4=16),
            "3 loads of 16 bytes, expected 4",
        ),
        (
            "group_norm_silu",
            launch_of("_normalize", torch.bfloat16, **NORM),
            row_of(load16=4, store4=16),
            "0 stores of 16 bytes, expected 4",
        ),
        ("group_norm_silu", launch_of("_statistics", torch.bfloat16, **NORM), row_of(load16=4), ""),
        ("group_norm_silu", launch_of("_statistics", torch.bfloat16, S=4, R=4), row_of(), ""),
        ("layer_norm", launch_of("_layer_norm", torch.float32, ROWS=4, BLOCK=512), row_of(), "0 l"),
        ("geglu", launch_of("_gradient", torch.bfloat16, BLOCK=4096), row_of(), ""),
    ],
)
def test_faults(op: str, one: Launch, row: dict[str, Any], fault: str) -> None:
    found = audit.fault(op, one, row)
    assert found.startswith(fault) if fault else found == ""


def test_instructions_are_counted_by_kind() -> None:
    names = {"HGMMA.64x128x16.F32.BF16": 4, "HMMA.16816.F32.BF16": 2, "UTCHMMA": 3, "LDG.E.128": 5}
    names |= {"LDG.E.U16.CONSTANT": 1, "LDG.E": 2, "LDG.E.64": 7, "STG.E.128": 1, "STG.E.U8": 2}
    names |= {"LDGSTS.E.BYPASS.128": 6, "LDGSTS.E": 1, "UTMALDG.2D": 2, "UTMASTG.2D": 1}
    names |= {"USETMAXREG.DEALLOC.CTAPOOL": 1, "LDL.64": 3, "STL": 2, "FFMA": 9, "LDGDEPBAR": 4}
    expected = {"hgmma": 4, "hmma": 2, "tcgen05": 3, "load16": 5, "load8": 7, "load4": 3}
    expected |= {"store16": 1, "store4": 2, "copy16": 6, "copy4": 1, "tma": 3, "setmaxnreg": 1}
    expected |= {"spills": 5}
    found = machine_code.count(Counter(names))
    assert {name: number for name, number in found.items() if number} == expected


@pytest.mark.compiles
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    triton.__version__ != pinned(), reason=f"the table is of triton {pinned()}, not of this one"
)
@pytest.mark.skipif(
    bool(machine_code.lacking()), reason=f"needs {machine_code.lacking()} in {machine_code.TOOLS}"
)
@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_every_program_is_what_the_table_says(arch: str) -> None:
    known = [row for row in audit.read() if row["arch"] == arch]
    for row, before in zip(compiled(arch), known, strict=True):
        assert row == before
