"""Ahead-of-time compiles against the table of resources: a kernel that newly spills fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compile" / "kernels.csv"
KERNELS = {
    "add_noise": {"_rotate"},
    "conv2d": {"_product", "_reduce"},
    "geglu": {"_geglu", "_gradient"},
    "group_norm_silu": {"_statistics", "_normalize", "_sums", "_gradient", "_parameters"},
    "layer_norm": {"_layer_norm", "_gradient", "_add_stripes"},
    "linear": {"_product", "_reduce"},
    "residual": {"_residual", "_sums", "_dbias"},
    "row_statistics": {"_row_statistics"},
    "sampler_step": {"_deviations", "_sampler_step"},
    "weighted_mse": {"_pieces", "_total", "_gradient", "_weight_gradient"},
}


def compiled(*options: str) -> list[dict[str, str]]:
    """In a process of its own: this one's triton may be the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.tools.compile_kernels", *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    return list(csv.DictReader(run.stdout.splitlines()))


def key(row: dict[str, str]) -> tuple[str, ...]:
    return row["op"], row["case"], row["kernel"], row["arch"]


def recorded() -> list[dict[str, str]]:
    with TABLE.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_covers_every_kernel_and_architecture() -> None:
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in recorded():
        seen[row["arch"]][row["op"]].add(row["kernel"])
    assert set(seen) == {"80", "90", "100", "120"}
    for arch, ops in seen.items():
        assert ops == KERNELS, arch


def test_no_more_shared_memory_than_a_consumer_gpu_has() -> None:
    for row in recorded():
        assert int(row["shared"]) <= 99 * 1024, row


@pytest.mark.compiles
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_every_kernel_compiles_at_the_models_shapes_without_new_spills(arch: str) -> None:
    known = [row for row in recorded() if row["arch"] == arch]
    for row, before in zip(compiled("--arch", arch), known, strict=True):
        assert key(row) == key(before)
        for column in ("spills", "local", "shared"):
            assert int(row[column]) <= int(before[column]), (column, row, before)
