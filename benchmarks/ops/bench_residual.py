"""Bias, residual and scale in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run, with_backward
from .shapes import RESIDUAL


def eager(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    return (x + bias[:, None, None] + residual) * 0.5


def ours(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    return ops.residual(x, residual, bias, 0.5)


def build(side: int, channels: int, backward: bool, device: str) -> Problem:
    pair = torch.randn(2, 2, channels, side, side, device=device, dtype=torch.bfloat16)
    x, residual = (v.contiguous(memory_format=torch.channels_last) for v in pair.unbind())
    bias = torch.randn(channels, device=device, dtype=torch.bfloat16)
    calls: dict[str, Any] = {"eager": eager, "ours": ours}
    moved = 3 * nbytes(x) + nbytes(bias)
    if backward:
        # The gradient is read for dx and once more for the bias, and dx is written.
        moved += 3 * nbytes(x) + nbytes(bias)
        calls = {k: with_backward(v) for k, v in calls.items()}
    inputs = {"x": x, "residual": residual, "bias": bias}
    return Problem(inputs, moved=moved, op="residual", **calls)


CASES = [
    Case(
        f"{model} 2x{channels}x{side}x{side}{' training' * backward}",
        build,
        (side, channels, backward),
        (8, 32, backward),
    )
    for model, side, channels in RESIDUAL
    for backward in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
