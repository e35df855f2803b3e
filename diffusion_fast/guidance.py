"""Classifier-free guidance as numbers per step: m = m_uncond + g (m_cond - m_uncond).

Ho & Salimans 2022 (arXiv:2207.12598), with g = 1 the plain conditional model and g = 0 the
unconditional one. Images for g > 1 follow the condition more closely and vary less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ops import checks
from .schedule import FloatArray

HALVES = ("conditional", "unconditional", "both")


@dataclass(frozen=True)
class GuidancePlan:
    """Guidance per step, and the halves of the model that must run.

    Attributes:
        scale: g, float64 [steps].
        rescale: phi of guidance rescale, float64 [steps]; 0 where guidance changes nothing.
        halves: ``"conditional"`` if g is 1 at every step, ``"unconditional"`` if it is 0 at every
            step, else ``"both"``.
    """

    scale: FloatArray
    rescale: FloatArray
    halves: str


def plan_guidance(
    sigma: FloatArray,
    scale: float | Sequence[float] = 1.0,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> GuidancePlan:
    """Guidance for the steps of a sampler.

    Args:
        sigma: the noise level sqrt((1 - abar) / abar) at which each step starts, [steps].
        scale: g, one number, or one per step in the order of sampling.
        interval: (low, high): guide only where low <= sigma <= high, and run the plain conditional
            model (g = 1) elsewhere (Kynkaanniemi et al. 2024, arXiv:2404.07724). The interval is in
            noise levels as in the paper, so it means the same for any sampler, spacing and number
            of steps; both model calls of a Heun step follow the step's own level.
        rescale: phi in [0, 1]: brings the guided output's standard deviation per image towards the
            conditional one's (Lin et al. 2023, arXiv:2305.08891, eq. 15-16).

    Raises:
        ValueError: a scale that isn't finite, a sequence of another length than the number of
            steps, an empty or negative interval, a rescale outside [0, 1].
    """
    steps = len(sigma)
    expected = f"a number or one for each of {steps} steps"
    try:
        g = np.asarray(scale, np.float64)
    except (TypeError, ValueError):
        checks.fail("guidance_scale", expected, repr(scale))
    if g.ndim > 1 or (g.ndim == 1 and len(g) != steps):
        checks.fail("guidance_scale", expected, f"shape {list(g.shape)}")
    if not np.isfinite(g).all():
        checks.fail("guidance_scale", "finite numbers", scale)
    g = np.broadcast_to(g, (steps,)).copy()
    if interval is not None:
        low, high = _interval(interval)
        g[(sigma < low) | (sigma > high)] = 1.0
    checks.finite("guidance_rescale", rescale)
    if not 0 <= rescale <= 1:
        checks.fail("guidance_rescale", "a number in [0, 1]", rescale)
    if (g == 1).all():
        halves = "conditional"
    elif (g == 0).all():
        halves = "unconditional"
    else:
        halves = "both"
    phi = np.where((g != 1) & (halves == "both"), float(rescale), 0.0)
    return GuidancePlan(g, phi, halves)


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    expected = "two noise levels (low, high) with 0 <= low <= high"
    try:
        low, high = (float(v) for v in interval)
    except (TypeError, ValueError):
        checks.fail("guidance_interval", expected, interval)
    if not 0 <= low <= high:  # also false for NaN; high may be infinite
        checks.fail("guidance_interval", expected, interval)
    return low, high
