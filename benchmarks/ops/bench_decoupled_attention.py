"""A text and an image in one attention call: the cross-attention of a U-Net with an IP-Adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

from ..lib.traffic import nbytes
from . import shapes
from .harness import VARIANTS, Case, Problem, run

TEXT = shapes.TEXT


def build(queries: int, heads: int, dim: int, tokens: int, device: str) -> Problem:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    q, k, v = (
        made(2, queries, heads, dim),
        made(2, TEXT + tokens, heads, dim),
        made(2, TEXT + tokens, heads, dim),
    )
    weights = torch.full((1, 1, 1), 0.6, device=device, dtype=torch.bfloat16)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_head = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2)

    def eager(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        text, image = one(q, k[:, :TEXT], v[:, :TEXT]), one(q, k[:, TEXT:], v[:, TEXT:])
        return torch.addcmul(text, image, weights[..., None]).contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return ops.decoupled_attention(q, k, v, (TEXT, tokens), weights)

    inputs = {"q": q, "k": k, "v": v, "weights": weights}
    moved = nbytes(q, q, k, v)
    return Problem(inputs, eager, ours, moved, op="decoupled_attention")


CASES = [
    Case(f"{model} {queries}x{dim} {tokens}", build, (queries, *rest), (64, 2, 40, tokens))
    for model, queries, *rest in shapes.CONTEXTS
    for _, dim, tokens in [rest]
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoupled_attention(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
