"""The benchmark of int8: its rows and its pictures."""

from __future__ import annotations

import pytest

from benchmarks.bench_int8 import layers, pictures, step
from diffusion_fast.ops import int8

pytestmark = pytest.mark.skipif(bool(int8.machine()), reason=" ".join(int8.machine()))


def test_a_row() -> None:
    row = step("small", 1)
    assert row["speedup"] == row["exact"] / row["int8"] > 0
    assert 0 < row["error"] < 0.5


def test_layers() -> None:
    shapes = [(2, 16, 32, 64, True), (2, 16, 32, 64, False), (2, 6, 5, 16, 8, False)]
    for row, (_, *x, out, _) in zip(layers(1, shapes), shapes, strict=True):
        assert row["weight"][:2] == [out, x[-1]]
        assert row["exact"] > 0 < row["int8"]
        assert 1e-3 < row["error"] < 0.03


def test_pictures() -> None:
    both, decibels = pictures(["a red apple", "cactus"], steps=4)
    assert both.shape == (2, 2, 3, 64, 64)
    assert all(30 < value < 80 for value in decibels)  # other pictures, but nearly
