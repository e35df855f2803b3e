"""Sample once: the plain loop, without rewrites and graphs, which the engine is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Context, Model, PerStep
from ..schedule import DiffusionSchedule
from .buffers import Generators
from .engine import Callback, Engine


def sample(
    model: Model,
    schedule: DiffusionSchedule,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    sampler: str = "ddpm",
    steps: int | None = None,
    context: Context | PerStep = None,
    null_context: Context | PerStep = None,
    x_T: Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
    x_0: Tensor | None = None,
    mask: Tensor | None = None,
    extra_channels: Tensor | None = None,
    **table: Any,
) -> Tensor:
    """Sample once: the short form of :class:`Engine`, where all arguments are described.

    ``table``: other attributes of :class:`~diffusion_fast.samplers.SamplerOptions`.

    ``guidance_scale`` 1.0 runs the conditional half only, 0.0 the unconditional half only, anything
    else both. ``steps=None`` takes all T steps of the schedule. With ``x_0`` and ``strength`` the
    loop starts from a noised image instead of pure noise; with ``x_0`` and ``mask`` it draws only
    where the mask is 1.

    Examples:
        >>> df.sample(lambda x, t: x, df.DiffusionSchedule(), (2, 3), sampler="ddim", steps=5).shape
        torch.Size([2, 3])
    """
    engine = Engine(
        model,
        schedule,
        graph="off",
        rewrites="none",
        device=device,
        progress=progress,
        sampler=sampler,
        steps=steps,
        **table,
    )
    return engine.sample(
        shape, context, null_context, x_T, generator, callback, x_0, mask, extra_channels
    )
