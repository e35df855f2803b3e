"""DDIM, PLMS and DDIM CFG++ on the timesteps of CompVis, as AUTOMATIC1111's web UI runs them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ops import checks
from ..schedule import DiffusionSchedule
from . import cfg_pp, ddim
from .grids import Grid, given
from .linear_multistep import ADAMS_BASHFORTH
from .program import EPS, H1, HISTORY, Program, X, Y
from .sampler import Calls, Sampler, SamplerOptions

CFG_PP_DIVISOR = 12.5  # so that a usual guidance scale means the small one of CFG++


def compvis_grid(schedule: DiffusionSchedule, steps: int, options: SamplerOptions) -> Grid:
    """From t to t - T // n, down to t = 1, where the picture stays: a step less than there are t.

    t is 1, 1 + T // n, 1 + 2 (T // n), ... below T, of which there may be more than n.

    Raises:
        ValueError: fewer than two of them.
    """
    known = given(schedule, steps, options, whole=True)
    if known is not None:
        return known
    count = schedule.timesteps
    t = np.minimum(np.arange(0, count, count // steps) + 1, count - 1)[::-1]
    if len(t) < 2:
        checks.fail("steps", f"at least 2 for {options.sampler}, which leaves out the last", steps)
    return Grid.from_alpha_bars(schedule.alpha_bar[t], t[:-1])


def plms(grid: Grid, options: SamplerOptions) -> Calls:
    """Adams-Bashforth of epsilon (Liu et al. 2022, arXiv:2202.09778), after a first step that is
    taken twice: the second time with the mean of epsilon at both of its ends."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        length = after - sigma
        if i == 0:
            program.call(i, sigma, after, X + length * EPS, y=X, history=EPS)
            program.call(i, after, after, Y + length * (0.5 * (EPS + H1)), history=None)
            continue
        weights = ADAMS_BASHFORTH[min(i, len(ADAMS_BASHFORTH) - 1)]
        terms = zip(weights, (EPS, *HISTORY), strict=False)
        state = sum((length * w * slope for w, slope in terms), X)
        program.call(i, sigma, after, state, history=EPS)
    return program.calls()


def _sampler(name: str, calls: cfg_pp.CallsOf, a1111: str, **others: Any) -> Sampler:
    return Sampler(name, compvis_grid, calls, a1111=a1111, own_grid=True, **others)


SAMPLERS = (
    _sampler("ddim_a1111", ddim.calls, "DDIM", options=ddim.OPTIONS),
    _sampler("plms", plms, "PLMS"),
    _sampler(
        "ddim_cfg_pp",
        cfg_pp.unclipped("ddim_cfg_pp", cfg_pp.euler),
        "DDIM CFG++",
        options={"eta": 0.0, "s_noise": 1.0},
        unconditional=True,
        guidance_divisor=CFG_PP_DIVISOR,
    ),
)
