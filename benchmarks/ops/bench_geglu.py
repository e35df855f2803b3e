"""GEGLU: [rows, 2C] -> [rows, C], beside two eager kernels that read the gate's half twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, liger, run, with_backward
from .shapes import GEGLU


def eager(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def build(rows: int, width: int, backward: bool, device: str) -> Problem:
    x = torch.randn(rows, 2 * width, device=device, dtype=torch.bfloat16)
    theirs = liger("liger_geglu")  # with the tanh approximation of gelu: see its error

    def other(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return theirs(gate, value)

    calls: dict[str, Any] = {"eager": eager, "ours": ops.geglu, "liger": other if theirs else None}
    # Forward x and y; backward x again, the gradient of y, and that of x.
    moved = nbytes(x) * 3 // 2 + (nbytes(x) * 5 // 2 if backward else 0)
    if backward:
        calls = {k: with_backward(v) if v else None for k, v in calls.items()}
    return Problem({"x": x}, moved=moved, op="geglu", **calls)


CASES = [
    Case(f"{model} {rows}x{width}{' training' * b}", build, (rows, width, b), (64, 320, b))
    for b in (False, True)
    for model, rows, width in GEGLU
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_geglu(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
