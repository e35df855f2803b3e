"""The benchmark of the time to the first image: its rows, and a way that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_first_image import COLUMNS, line, measure, rows


def test_a_cold_and_a_warm_row() -> None:
    found = list(rows("small", "float32", 1, ["ours"]))
    assert [row["caches"] for row in found] == ["cold", "warm"]
    for row in found:
        assert "reason" not in row
        assert all(row[column] > 0 for column in COLUMNS)
        stages = sum(row[column] for column in COLUMNS[:3])
        assert row["to_first_image_s"] == pytest.approx(stages)
        assert "s to the first image" in line(row)


def test_a_way_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ours: .*nowhere"):
        measure("ours", tmp_path / "nowhere", "float32", 1, tmp_path)
    assert "did not run: why" in line({"way": "ours", "caches": "cold", "reason": "why"})
