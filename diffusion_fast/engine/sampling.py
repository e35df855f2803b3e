"""Sample once: the plain loop, without rewrites and graphs, which the engine is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..conditioning import Context, Model
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
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    final_alpha: str = "one",
    prediction_type: str = "epsilon",
    variance: str = "large",
    eta: float = 0.0,
    clip_sample: bool | float = False,
    context: Context = None,
    null_context: Context = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    x_T: Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
    x_0: Tensor | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    extra_channels: Tensor | None = None,
) -> Tensor:
    """Sample once: the short form of :class:`Engine`, where all arguments are described.

    ``guidance_scale`` 1.0 runs the conditional half only, 0.0 the unconditional half only, anything
    else both. ``steps=None`` takes all T steps of the schedule. With ``x_0`` and ``strength`` the
    loop starts from a noised image instead of pure noise; with ``x_0`` and ``mask`` it draws only
    where the mask is 1.
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
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        final_alpha=final_alpha,
        prediction_type=prediction_type,
        variance=variance,
        eta=eta,
        clip_sample=clip_sample,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
        strength=strength,
    )
    return engine.sample(
        shape, context, null_context, x_T, generator, callback, x_0, mask, extra_channels
    )
