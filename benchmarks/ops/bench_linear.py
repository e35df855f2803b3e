"""Linear layers with what follows them, beside the product and the kernels after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run
from .shapes import LINEAR


def build(rows: int, columns: int, inner: int, after: str, device: str) -> Problem:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    inputs = {
        "x": randn(rows, inner),
        "weight": randn(columns, inner) / inner**0.5,
        "bias": randn(columns),
    }
    if after == "residual":
        inputs["residual"] = randn(rows, columns)
    gated = after == "geglu"

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        if gated:
            value, gate = y.chunk(2, dim=-1)
            y = value * F.gelu(gate)
        return y if residual is None else y + residual

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, weight, bias, residual=residual, geglu=gated)

    result = rows * columns // (2 if gated else 1) * inputs["x"].element_size()
    return Problem(inputs, eager, ours, moved=nbytes(inputs) + result, op="linear")


CASES = [
    Case(f"{model} {rows}x{columns}x{inner} {after}", build, (rows, columns, inner, after),
         (64, 64, 32, after))
    for model, rows, columns, inner, after in LINEAR
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
