"""The benchmark of loading holds its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_loading import CASES, LIMIT, REDUCED, Case, run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peak_memory_of_loading(case: Case) -> None:
    row = run(case, REDUCED)
    assert row["model"] > 100e6
    assert 0.8 < row["peak"] / row["model"] <= LIMIT
