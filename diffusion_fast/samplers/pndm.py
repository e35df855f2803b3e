"""PNDM's pseudo linear multistep method, PLMS (Liu et al. 2022, arXiv:2202.09778)."""

from __future__ import annotations

import math

import numpy as np

from ..ops import checks
from ..prediction import epsilon_coefficients
from .grids import Grid, ddim_grid
from .linear_multistep import ADAMS_BASHFORTH
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions
from .table import INDEX, coefficients


def calls(grid: Grid, options: SamplerOptions) -> Calls:
    """DDIM's steps with the model's output m extrapolated by Adams-Bashforth, as diffusers has it.

    The first step is taken twice: the second time from its start again, with the mean of m there
    and at its end. That second call does not enter the history, which holds m.
    """
    if options.clip < math.inf:
        checks.fail("clip_sample", "False for pndm, which has no x_0 to clip", options.clip_sample)
    n = len(grid)
    repeats = n > 1
    point = np.array([0, 1, *range(1, n)] if repeats else [0])  # where each call is
    step = np.array([0, *range(n)] if repeats else [0])
    signal, noise = grid.signal[point].copy(), grid.noise[point].copy()  # that each call goes from
    after, after_noise = grid.next_signal[step].copy(), grid.next_noise[step].copy()
    if repeats:
        after[1], after_noise[1] = signal[1], noise[1]
        signal[1], noise[1] = _start(grid, options)
    e_x, e_m = epsilon_coefficients(options.prediction_type, signal, noise)
    amount = after_noise - after * noise / signal  # of epsilon, in DDIM's step
    c_x = after / signal + amount * e_x
    rows = coefficients(len(point), c_x=c_x, e_0=0.0, e_m=1.0)
    for i, row in enumerate(rows):
        again = repeats and i == 1
        weights = (0.5, 0.5) if again else ADAMS_BASHFORTH[min(max(i - 1, 0), 3)]
        for name, weight in zip(("m", "1", "2", "3"), weights, strict=False):
            row[INDEX[f"c_{name}"]] = amount[i] * e_m[i] * weight
    if repeats:
        rows[0, INDEX["d_x"]] = 1.0
        rows[1, INDEX["c_y"]], rows[1, INDEX["c_x"]], rows[1, INDEX["e_m"]] = c_x[1], 0.0, 0.0
    return Calls(
        rows, step, grid.timesteps[point], grid.signal[point], grid.noise[point], after, after_noise
    )


def _start(grid: Grid, options: SamplerOptions) -> tuple[float, float]:
    """A and S where the repeated step starts: a T // n-th above its end."""
    if grid.levels is None or options.timesteps is not None or not options.steps:
        return float(grid.signal[0]), float(grid.noise[0])
    t = grid.timesteps[1] + len(grid.levels) // options.steps
    sigma = float(grid.levels[int(min(t, len(grid.levels) - 1))])
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


SAMPLERS = (
    Sampler(
        "pndm",
        ddim_grid,
        calls,
        diffusers=(DiffusersName("PNDMScheduler"),),
    ),
)
