"""The weighted mean squared error, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run, with_backward
from .shapes import LATENTS


def eager(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    square = (prediction.float() - target.float()).square()
    return (square * weight.view(-1, 1, 1, 1)).mean()


def eager_double(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The same without rounding float64 truth to float32."""
    if prediction.dtype != torch.float64:
        return eager(prediction, target, weight)
    return ((prediction - target).square() * weight.view(-1, 1, 1, 1)).mean()


def build(batch: int, side: int, backward: bool, device: str) -> Problem:
    pair = torch.randn(2, batch, 4, side, side, device=device, dtype=torch.bfloat16).unbind()
    inputs = dict(zip(("prediction", "target"), pair, strict=True))
    inputs["weight"] = torch.rand(batch, device=device)
    calls: dict[str, Any] = {"eager": eager_double, "ours": ops.weighted_mse}
    moved = nbytes(pair)
    if backward:
        moved += 2 * nbytes(pair)  # both again, and both gradients
        calls = {k: with_backward(v) for k, v in calls.items()}
    return Problem(inputs, moved=moved, op="weighted_mse", **calls)


CASES = [
    Case(
        f"{model} {batch}x4x{side}x{side}{' training' * backward}",
        build,
        (batch, side, backward),
        (2, 16, backward),
    )
    for model, batch, side in LATENTS
    for backward in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weighted_mse(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
