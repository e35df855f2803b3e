"""The schedules of noise levels of k-diffusion, AUTOMATIC1111 and ComfyUI, under their names.

There a schedule is made of the model's noise levels alone, the same for every sampler. t is
interpolated in log sigma; ComfyUI takes the nearest whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..ops import checks
from ..schedule import DiffusionSchedule, FloatArray
from . import gits, published
from .grids import SIGMAS, Grid, GridOptions, beta_quantile, given, schedule_levels

CONVENTIONS = ("diffusers", "k_diffusion", "comfyui")


def _normal(levels: FloatArray, steps: int) -> FloatArray:
    """Evenly spaced t from T - 1 to 0."""
    return _at(levels, np.linspace(len(levels) - 1, 0, steps))


def _sgm_uniform(levels: FloatArray, steps: int) -> FloatArray:
    """The first n of n + 1 evenly spaced t."""
    return _at(levels, np.linspace(len(levels) - 1, 0, steps + 1)[:-1])


def _simple(levels: FloatArray, steps: int) -> FloatArray:
    """Every (T / n)-th level from the last."""
    return levels[[-1 - int(k * len(levels) / steps) for k in range(steps)]]


def _ddim_uniform(levels: FloatArray, steps: int) -> FloatArray:
    """t = 1, 1 + T // n, ...: as many as there are below T, which may be more than n."""
    return levels[1 :: max(len(levels) // steps, 1)][::-1]


def _beta(levels: FloatArray, steps: int) -> FloatArray:
    """t at quantiles of Beta(0.6, 0.6) (Lee et al. 2024, arXiv:2407.12173), each but once."""
    u = 1 - np.linspace(0, 1, steps, endpoint=False)
    t = np.rint(beta_quantile(u) * (len(levels) - 1)).astype(np.int64)
    return levels[np.unique(t)[::-1]]


def _kl_optimal(levels: FloatArray, steps: int) -> FloatArray:
    """arctan(sigma) falls linearly (Sabour et al. 2024, arXiv:2404.14507, theorem 3.1)."""
    u = np.linspace(0, 1, steps)
    return np.tan(u * math.atan(levels[0]) + (1 - u) * math.atan(levels[-1]))


def _linear_quadratic(levels: FloatArray, steps: int) -> FloatArray:
    """1 - sigma / sigma_max rises linearly to 0.025, then quadratically to 1."""
    if steps == 1:
        return levels[-1:]
    threshold, linear = 0.025, steps // 2
    rest, lag = steps - linear, linear - threshold * steps
    square = lag / (linear * rest**2)
    k = np.arange(float(steps))
    slope = threshold / linear - 2 * lag / rest**2
    bent = square * k**2 + slope * k + square * linear**2
    return (1 - np.where(k < linear, k * threshold / linear, bent)) * levels[-1]


def _at(levels: FloatArray, t: FloatArray) -> FloatArray:
    """Noise levels at fractional t, interpolated in log sigma."""
    return np.exp(np.interp(t, np.arange(len(levels)), np.log(levels)))


@dataclass(frozen=True)
class _Published:
    """A table of noise levels.

    ``to_ends``: moved and scaled so that it goes from the model's highest level to its lowest.
    """

    table: tuple[float, ...]
    to_ends: bool = True

    def levels(self, levels: FloatArray, count: int) -> FloatArray:
        known = np.array(self.table)
        if self.to_ends:
            part = (known - known[-1]) / (known[0] - known[-1])
            known = levels[0] + part * (levels[-1] - levels[0])
        return _log_linear(known, count)


def _log_linear(known: FloatArray, count: int) -> FloatArray:
    """Another number of levels."""
    if count == len(known):
        return known
    at = np.linspace(0, 1, count)
    return np.exp(np.interp(at, np.linspace(0, 1, len(known)), np.log(known)))


_PUBLISHED = {
    "ays": _Published(published.AYS, to_ends=False),
    "ays_sdxl": _Published(published.AYS_SDXL, to_ends=False),
    "ays_11": _Published(published.AYS),
    "ays_11_sdxl": _Published(published.AYS_SDXL),
    "ays_32": _Published(published.AYS_32),
    "ays_32_sdxl": _Published(published.AYS_32_SDXL),
    "ays_gits": _Published(published.AYS_GITS),
    "ays_gits_sdxl": _Published(published.AYS_GITS_SDXL),
}


def _gits(levels: FloatArray, steps: int, coefficient: float = gits.USUAL) -> FloatArray:
    """The published levels of 2 to 20 steps; of more, those between the last."""
    checks.whole_between("steps", steps, 2)
    known = np.array(gits.levels_of(coefficient, min(steps, 20)))
    return _log_linear(known, steps + 1)[:-1]


SCHEDULES: dict[str, Callable[[FloatArray, int], FloatArray]] = {
    "normal": _normal,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
    "kl_optimal": _kl_optimal,
    "linear_quadratic": _linear_quadratic,
    "gits": _gits,
    **{f"gits_{c:g}": partial(_gits, coefficient=c) for c in gits.TABLES},
}
NAMES = (*SCHEDULES, "karras", "exponential", "polyexponential", *_PUBLISHED)


def schedule_grid(
    schedule: DiffusionSchedule, steps: int, options: GridOptions, *, drops_penultimate: bool
) -> Grid:
    """The grid of a schedule's name; its levels end at 0.

    Args:
        drops_penultimate: make one step more and leave out the last level above 0.
    """
    levels, spacing = schedule_levels(schedule), options.timestep_spacing
    whole = options.convention == "comfyui"
    if options.count is not None:
        grid = given(schedule, steps, options, whole=whole)
        assert grid is not None
    else:
        checks.one_of("timestep_spacing", spacing, NAMES)
        wanted = steps + 1 if drops_penultimate else steps
        sigma = _named(levels, wanted, options)
        sigma = sigma[:-1] if drops_penultimate else sigma
        t = np.interp(np.log(sigma), np.log(levels), np.arange(len(levels)))
        grid = Grid.from_sigmas(np.append(sigma, 0.0), t.round() if whole else t)
    full = whole and grid.sigma[0] >= levels[-1] * (1 - 1e-5)
    return grid.starting(1.0 if full else float(grid.noise[0]))


def _named(levels: FloatArray, steps: int, options: GridOptions) -> FloatArray:
    name = options.timestep_spacing
    if name in _PUBLISHED:
        # ComfyUI puts 0 in the place of the last level, A1111 after it.
        count = steps + 1 if options.convention == "comfyui" else steps
        return _PUBLISHED[name].levels(levels, count)[:steps]
    low = levels[0] if options.sigma_min is None else options.sigma_min
    high = levels[-1] if options.sigma_max is None else options.sigma_max
    if name in SCHEDULES:
        return SCHEDULES[name](levels, steps)
    kind = "exponential" if name == "polyexponential" else name
    return SIGMAS[kind].levels(low, high, np.linspace(0, 1, steps))
