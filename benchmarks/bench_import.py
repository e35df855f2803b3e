"""How long ``import diffusion_fast`` takes beyond ``import torch``, in processes of their own.

    pytest benchmarks/bench_import.py --benchmark-enable

The difference of two processes' times, taken in turns; its median should be under 0.3 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

from harness import environment

ROUNDS = 7
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str, before: str = "pass") -> float:
    command = [sys.executable, "-c", f"{before}; {TIMED.format(module)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_import(benchmark: Any) -> None:
    """pytest-benchmark stores whole processes; ``extra_info`` has what the import alone took."""
    beyond: list[float] = []
    benchmark.pedantic(
        lambda: beyond.append(seconds("diffusion_fast", "import torch")),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    median = statistics.median(beyond[1:] or beyond)
    benchmark.extra_info |= environment() | {"beyond_torch_s": median}
    print(f"\nimport diffusion_fast: {median:.3f} s beyond torch")
