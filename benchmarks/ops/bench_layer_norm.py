"""LayerNorm over the last dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, liger, run, with_backward
from .shapes import LAYER_NORM


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def build(rows: int, width: int, backward: bool, device: str) -> Problem:
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, width, device=device, dtype=torch.bfloat16).unbind()
    theirs = liger("liger_layer_norm")
    calls: dict[str, Any] = {
        "eager": eager,
        "ours": ops.layer_norm,
        "liger": (lambda x, weight, bias: theirs(x, weight, bias, 1e-5)) if theirs else None,
    }
    parameters = nbytes(weight, bias)
    moved = 2 * nbytes(x) + parameters
    if backward:
        # x, the gradients of y and x, and the parameters'; the stripes' partial sums stay in L2.
        moved += 3 * nbytes(x) + 2 * parameters
        calls = {k: with_backward(v) if v else None for k, v in calls.items()}
    inputs = {"x": x, "weight": weight, "bias": bias}
    return Problem(inputs, moved=moved, op="layer_norm", **calls)


CASES = [
    Case(f"{model} {rows}x{width}{' training' * b}", build, (rows, width, b), (64, 320, b))
    for b in (False, True)
    for model, rows, width in LAYER_NORM
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
