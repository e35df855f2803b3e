"""What a step costs by its ops, and how fast this GPU could do that at best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from diffusion_fast.engine.rewrites.controlled import prepare
from diffusion_fast.engine.rewrites.cost import DEVICE, Counter, DryRun
from diffusion_fast.models import UNet2DCondition

from ..lib.environment import GPU
from ..lib.timing import copy_rate, product_rate
from .networks import TOKENS, Kind


def step_cost(
    kind: Kind, dtype: torch.dtype, batch: int, rewrites: str | Iterable[str] = "all"
) -> Counter:
    """Launches, bytes and FLOPs of a step of ``batch`` images with guidance, by op."""
    with DEVICE:
        model = UNet2DCondition(kind.unet)
    run = DryRun(model, dtype, 2 * batch, (kind.side, kind.side), TOKENS)
    plan: dict[str, Any] = {"batch": batch, "halves": 2, "max_rows": 1, "rewrites": rewrites}
    return run.step(lambda twin: prepare(twin, **plan))


def limit_seconds(cost: Counter, dtype: torch.dtype) -> float | None:
    """The least time of a step on this GPU, None without one.

    A roofline for each kind of op: its FLOPs at the rate of a large product, or its bytes at that
    of a large copy, whichever takes longer; both rates are measured here.
    """
    if not GPU:
        return None
    flops, bandwidth = product_rate(dtype), copy_rate()
    return sum(max(one.flops / flops, one.bytes / bandwidth) for one in cost.by_op.values())
