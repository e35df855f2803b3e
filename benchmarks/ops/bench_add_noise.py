"""Noising with its target; noise read, or drawn in the kernel (which saves reading it)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run
from .shapes import LATENTS

TABLES = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


def eager_v(x_0: Tensor, noise: Tensor, t: Tensor, **tables: Tensor) -> tuple[Tensor, Tensor]:
    a, s = (tables[name][t].view(-1, 1, 1, 1) for name in TABLES)
    return (a * x_0 + s * noise).to(x_0.dtype), (a * noise - s * x_0).to(x_0.dtype)


def ours_v(x_0: Tensor, noise: Tensor, t: Tensor, **tables: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_noise(x_0, noise, t, target="v_prediction", **tables)


def eager_drawn(x_0: Tensor, t: Tensor, **tables: Tensor) -> tuple[Tensor, Tensor]:
    """Its noise is another one: only the time compares."""
    noise = torch.randn_like(x_0)
    a, s = (tables[name][t].view(-1, 1, 1, 1) for name in TABLES)
    return (a * x_0 + s * noise).to(x_0.dtype), noise


PHILOX = ops.Philox(1)


def ours_drawn(x_0: Tensor, t: Tensor, **tables: Any) -> tuple[Tensor, Tensor]:
    return ops.add_noise(x_0, PHILOX, t, **tables)


def build(batch: int, side: int, drawn: bool, dtype: torch.dtype, device: str) -> Problem:
    x_0, noise = torch.randn(2, batch, 4, side, side, device=device, dtype=dtype).unbind()
    inputs = {"x_0": x_0, "t": torch.randint(1000, (batch,), device=device)}
    inputs |= {name: torch.rand(1000, device=device) for name in TABLES}
    if drawn:
        return Problem(inputs, eager_drawn, ours_drawn, 3 * nbytes(x_0), "add_noise_philox")
    return Problem(inputs | {"noise": noise}, eager_v, ours_v, 4 * nbytes(x_0), "add_noise")


CASES = [
    Case(
        f"{model} {batch}x4x{side}x{side} {str(dtype)[6:]}{' drawn' * drawn}",
        build,
        (batch, side, drawn, dtype),
        (2, 16, drawn, dtype),
    )
    for model, batch, side in LATENTS
    for dtype in (torch.float32, torch.bfloat16)
    for drawn in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_noise(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
