"""Linear multistep methods: epsilon, the slope in sigma, as a polynomial through the last calls.

    x' = x + sum over k of w_k epsilon_k,    w_k = integral of L_k dsigma over the step

with Lagrange's L_k in a variable that each method chooses. Their history holds epsilon.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..schedule import DiffusionSchedule, FloatArray
from .dpm_solver import FEW_STEPS
from .grids import Grid, GridOptions, sigma_grid, solver_grid
from .program import EPS, HISTORY, Program, X
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions

Weights = Callable[[Sequence[float], float], FloatArray]  # of (sigmas, newest first; the next one)

_POINTS = np.polynomial.legendre.leggauss(32)
ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def lagrange_integrals(
    nodes: Sequence[float], start: float, end: float, weight: Callable[[FloatArray], FloatArray]
) -> FloatArray:
    """Integrals of weight(u) L_k(u) over [start, end], for each of the nodes, by Gauss-Legendre."""
    points, weights = _POINTS
    u = start + (end - start) * (points + 1) / 2
    amount = weight(u) * weights * (end - start) / 2
    return np.array(
        [
            (amount * np.prod([(u - b) / (a - b) for j, b in enumerate(nodes) if j != k], 0)).sum()
            for k, a in enumerate(nodes)
        ]
    )


def calls(
    grid: Grid, options: SamplerOptions, weights: Weights, *, direct: bool = False, few: int = 0
) -> Calls:
    """Of the order that the history allows.

    Args:
        weights: w_k of each step.
        direct: whether a step to no noise is of first order: to x_0.
        few: the number of steps below which the last two are of lower order (lower_order_final).
    """
    program, n = Program(grid, options), len(grid)
    total = options.steps or 0
    lowers = options.lower_order_final and 0 < total < few
    for i, sigma, after in program.steps():
        order = min(options.order or 1, i + 1, n - i if lowers else n)
        if after == 0 and direct:
            order = 1
        last = program.sigmas[i - order + 1 : i + 1][::-1]
        slopes = (EPS, *HISTORY)
        terms = zip(weights(last, after), slopes, strict=False)
        state = sum((w * slope for w, slope in terms), X)
        program.call(i, sigma, after, state, history=EPS)
    return program.calls()


def in_sigma(last: Sequence[float], after: float) -> FloatArray:
    """LMS: polynomials in sigma."""
    return lagrange_integrals(last, last[0], after, np.ones_like)


def in_log_sigma(last: Sequence[float], after: float) -> FloatArray:
    """DEIS as diffusers has it: in log sigma (Zhang & Chen 2023, arXiv:2204.13902)."""
    if len(last) == 1:
        return np.array([after - last[0]])
    nodes = [math.log(sigma) for sigma in last]
    return lagrange_integrals(nodes, nodes[0], math.log(after), np.exp)


def in_time(last: Sequence[float], after: float) -> FloatArray:
    """DEIS as ComfyUI has it: in the time of a linear schedule with sigma from 0.002 to 80."""
    low, high, least = math.log1p(0.002**2), math.log1p(80.0**2), 1e-3
    rise = 2 * (low / least - high) / (least - 1)
    start = high - rise / 2  # log(1 + sigma^2) = rise t^2 / 2 + start t

    def time(sigma: float) -> float:
        return (math.sqrt(start**2 + 2 * rise * math.log1p(sigma**2)) - start) / rise

    def slope(t: FloatArray) -> FloatArray:
        growth = np.expm1(rise * t**2 / 2 + start * t)
        return (rise * t + start) * (growth + 1) / (2 * np.sqrt(growth))

    if len(last) == 1:
        return np.array([after - last[0]])
    return lagrange_integrals([time(s) for s in last], time(last[0]), time(after), slope)


def evenly(last: Sequence[float], after: float) -> FloatArray:
    """iPNDM: Adams-Bashforth, as if all steps were of one length (arXiv:2204.13902)."""
    return (after - last[0]) * np.array(ADAMS_BASHFORTH[len(last) - 1])


def by_lengths(last: Sequence[float], after: float) -> FloatArray:
    """iPNDM_v: with the steps' lengths, as diff-sampler and ComfyUI have it.

    A factor of the second term differs from that of Adams-Bashforth where the lengths differ.
    """
    h = [after - last[0], *(a - b for a, b in itertools.pairwise(last))]
    weights = np.zeros(4)
    weights[0] = 1.0
    if len(last) > 1:
        weights[:2] += 0.5 * h[0] / h[1] * np.array([1.0, -1.0])
    if len(last) > 2:
        bend = 0.5 - h[0] ** 2 / (6 * h[1] * (h[1] + h[2]))
        r = h[1] / h[2]
        weights[:3] += bend * np.array([1.0, -1 - r, r])
    if len(last) > 3:
        two, three = h[0] + h[1], h[0] + h[1] + h[2]
        third = (1 - h[0] / (3 * two)) / 2 + (1 - h[0] / (2 * two)) * h[0] / (6 * three)
        third *= h[0] * two * three / (h[1] * (h[1] + h[2]) * (h[1] + h[2] + h[3]))
        older = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
        r, far = h[1] / h[2], 1 + h[2] / h[3]
        weights += third * np.array([1.0, -1 - r - older, r + older * far, -older * r])
    return h[0] * weights[: len(last)]


def first_level_grid(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    """DPM-Solver's grid, which ends at the level of t = 0, whatever ``final_alpha``."""
    return solver_grid(schedule, steps, dataclasses.replace(options, final_alpha="first"))


def _deis(order: int) -> Sampler:
    return Sampler(
        f"deis_{order}",
        first_level_grid,
        partial(calls, weights=in_log_sigma, direct=True, few=FEW_STEPS),
        options={"order": order, "lower_order_final": True},
        diffusers=(DiffusersName("DEISMultistepScheduler", {"solver_order": order}),),
    )


SAMPLERS = (
    Sampler(
        "lms",
        sigma_grid,
        partial(calls, weights=in_sigma),
        options={"order": 4},
        diffusers=(DiffusersName("LMSDiscreteScheduler"),),
        comfyui="lms",
        a1111="LMS",
        k_diffusion=True,
    ),
    Sampler(
        "ipndm",
        sigma_grid,
        partial(calls, weights=evenly, direct=True),
        options={"order": 4},
        comfyui="ipndm",
    ),
    Sampler(
        "ipndm_v",
        sigma_grid,
        partial(calls, weights=by_lengths, direct=True),
        options={"order": 4},
        comfyui="ipndm_v",
    ),
    Sampler(
        "deis",
        sigma_grid,
        partial(calls, weights=in_time, direct=True),
        options={"order": 3},
        comfyui="deis",
    ),
    *(_deis(order) for order in (1, 2, 3)),
)
