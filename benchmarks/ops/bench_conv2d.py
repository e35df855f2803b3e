"""Convolutions of the models in channels_last, beside a concatenation, cuDNN and an addition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run
from .shapes import CONV2D


def build(
    side: int, first: int, second: int, out: int, window: int, stride: int, device: str
) -> Problem:
    def image(*size: int) -> Tensor:
        x = torch.randn(*size, device=device, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last)

    after, padding = (side + 2 * (window // 2) - window) // stride + 1, window // 2
    inputs = {
        "x": image(2, first, side, side),
        "weight": image(out, first + second, window, window) / (window * first**0.5),
        "bias": torch.randn(out, device=device, dtype=torch.bfloat16),
        "residual": image(2, out, after, after),
    }
    if second:
        inputs["x2"] = image(2, second, side, side)

    def eager(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x2: Tensor | None = None
    ) -> Tensor:
        both = x if x2 is None else torch.cat((x, x2), 1)
        return F.conv2d(both, weight, bias, stride, padding) + residual

    def ours(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x2: Tensor | None = None
    ) -> Tensor:
        return ops.conv2d(x, weight, bias, stride=stride, padding=padding, x2=x2, residual=residual)

    return Problem(inputs, eager, ours, nbytes(inputs, inputs["residual"]), op="conv2d")


CASES = [
    Case(f"{model} {side}x{side} {first}+{second} to {out} {window}x{window} /{stride}", build,
         (side, first, second, out, window, stride), (8, 8, min(second, 8), 8, window, stride))
    for model, side, first, second, out, window, stride in CONV2D
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
