"""The benchmarks' harness, as far as it can be held to something without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_inductor_counts_the_bytes_of_what_it_compiles() -> None:
    """Every time: a kernel from its caches would count for nothing."""
    code = (
        "import torch\n"
        "from benchmarks.ops import harness\n"
        "metrics = harness.inductor_metrics()\n"
        "for _ in range(2):\n"
        "    metrics.reset(), torch._dynamo.reset()\n"
        "    torch.compile(torch.nn.functional.silu, dynamic=False)(torch.ones(1000))\n"
        "    print(metrics.num_bytes_accessed)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT
    )
    assert run.stdout.split() == ["8000", "8000"]
