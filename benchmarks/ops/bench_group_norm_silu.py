"""GroupNorm + SiLU with the time embedding before it, from one source or two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, liger, run, with_backward
from .shapes import GROUP_NORM, GROUPS


def joined(x: Tensor, x2: Tensor | None, add: Tensor) -> Tensor:
    x = x if x2 is None else torch.cat((x, x2), 1)
    return x + add[:, :, None, None]


def eager(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor, x2: Tensor | None = None) -> Tensor:
    return F.silu(F.group_norm(joined(x, x2, add), GROUPS, weight, bias))


def ours(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor, x2: Tensor | None = None) -> Tensor:
    return ops.group_norm_silu(x, GROUPS, weight, bias, add=add, x2=x2)


def fits_on_chip(side: int, channels: int, arrays: int) -> bool:
    """Whether our kernel holds a whole group; then it reads its inputs once."""
    from diffusion_fast.kernels.group_norm_silu import SLAB
    from diffusion_fast.kernels.launch import power_of_2

    return power_of_2(side * side) * power_of_2(channels // GROUPS) * arrays <= SLAB


def build(
    batch: int, side: int, first: int, second: int, last: bool, backward: bool, device: str
) -> Problem:
    layout = torch.channels_last if last else torch.contiguous_format

    def image(channels: int) -> Tensor:
        value = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
        return value.contiguous(memory_format=layout)

    channels = first + second
    inputs = {"x": image(first)} | ({"x2": image(second)} if second else {})
    for name in ("weight", "bias"):
        inputs[name] = torch.randn(channels, device=device, dtype=torch.bfloat16)
    inputs["add"] = torch.randn(batch, channels, device=device, dtype=torch.bfloat16)
    theirs = liger("liger_group_norm")

    def other(
        x: Tensor, weight: Tensor, bias: Tensor, add: Tensor, x2: Tensor | None = None
    ) -> Tensor:
        x = joined(x, x2, add).contiguous()
        return F.silu(theirs(x, weight, bias, channels, GROUPS, 1e-5))

    calls: dict[str, Any] = {"eager": eager, "ours": ours, "liger": other if theirs else None}
    size = batch * channels * side * side * 2
    small = nbytes([v for k, v in inputs.items() if k not in ("x", "x2")])
    moved = (2 if fits_on_chip(side, channels, 1) else 3) * size + small
    if backward:
        # x and dy once, dx; or x three times and dy twice.
        moved += (3 if fits_on_chip(side, channels, 2) else 6) * size + 2 * small
        calls = {k: with_backward(v) if v else None for k, v in calls.items()}
    return Problem(inputs, moved=moved, op="group_norm_silu", **calls)


CASES = [
    Case(
        f"{model} {batch}x{first}+{second}x{side}x{side} {'NHWC' if last else 'NCHW'}"
        f"{' training' * backward}",
        build,
        (batch, side, first, second, last, backward),
        (1, 8, 64, 64 * bool(second), last, backward),
    )
    for model, side, first, second in GROUP_NORM
    for batch, last, backward in (
        (2, True, False),
        (2, False, False),
        (1, True, False),
        (2, True, True),
    )
] + [
    # Large enough for bandwidth to be what counts.
    Case("64 MB and more NHWC", build, (16, 64, 640, 0, True, False), (1, 8, 64, 0, True, False)),
    Case("64 MB, on chip", build, (128, 16, 1280, 0, True, False), (1, 8, 64, 0, True, False)),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_group_norm_silu(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
