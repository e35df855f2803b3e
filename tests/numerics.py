"""The one tolerance rule of this project.

Truth is computed in float64 (by the reference, on float64 copies of the inputs); errors are
max-norms over max|truth|. A result passes when

    err(result) <= factor * err(plain PyTorch in the same dtype) + atol

with factor 2 (3 for gradients of attention). Nothing else in the tests decides what is close.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-3,
}


def error(value: Tensor, truth: Tensor) -> float:
    """max|value - truth| / max|truth|, NaN if either holds one that the other doesn't."""
    truth = truth.double()
    scale = truth.abs().max().item() if truth.numel() else 0.0
    if not truth.numel():
        return 0.0
    return ((value.double() - truth).abs().max() / (scale or 1.0)).item()


def assert_close(
    result: Tensor, truth: Tensor, plain: Tensor | None = None, factor: float = 2.0
) -> None:
    """Hold ``result`` to the rule.

    Args:
        result: what is tested; its dtype decides the absolute tolerance.
        truth: the same in float64.
        plain: plain PyTorch in the dtype of ``result``; None counts as an exact computation.
        factor: how many times the error of ``plain`` is allowed.
    """
    assert result.shape == truth.shape, f"shape {list(result.shape)}, truth {list(truth.shape)}"
    allowed = ATOL[result.dtype] + (factor * error(plain, truth) if plain is not None else 0.0)
    got = error(result, truth)
    assert got <= allowed, f"relative error {got:.3g}, allowed {allowed:.3g}"
