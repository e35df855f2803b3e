"""Mean and deviation of rows: what a layer norm that is folded into a product still needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run
from .shapes import LAYER_NORM


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float(), dim=-1, correction=0)
    return mean, (variance + 1e-5).rsqrt()


def build(rows: int, width: int, device: str) -> Problem:
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    moved = nbytes(x, *eager(x))
    return Problem({"x": x}, eager, ops.row_statistics, moved, op="row_statistics")


CASES = [
    Case(f"{model} {rows}x{width}", build, (rows, width), (64, 320))
    for model, rows, width in LAYER_NORM
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_statistics(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
