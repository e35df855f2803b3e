"""SA-Solver (Xue et al. 2023, arXiv:2309.05019): stochastic Adams, a predictor and a corrector.

In lambda = log(1 / sigma) a step of length h, with noise of strength tau, is

    x' = exp(-tau^2 h) sigma'/sigma x + p integral over [0, h] of exp(p (v - h)) x_0 dv
         + sigma' sqrt(1 - exp(-2 tau^2 h)) z,        p = 1 + tau^2

with x_0 replaced by a polynomial. The corrector takes the step again, with the same noise and the
new x_0 as one more point: what it changes is linear in x_0s, so all of it but the new one's term is
kept as y.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..ops import checks
from ..schedule import FloatArray
from .grids import Grid, sigma_grid
from .linear_multistep import first_level_grid, lagrange_integrals
from .program import EPS, HISTORY, X0, Program, Sum, X, Y, Z
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions

Weights = Callable[[Sequence[float], float, float, float], FloatArray]  # (nodes, h, sigma', tau)


def calls(grid: Grid, options: SamplerOptions, *, epsilon: bool = False) -> Calls:
    """As diffusers has it: noise is drawn at every step, and tau is eta where 200 <= t <= 800.

    Args:
        epsilon: predict noise in place of data (``algorithm_type="noise_prediction"``).
    """
    program, n = Program(grid, options), len(grid)
    predicts, corrects = options.predictor_order or 1, options.corrector_order or 1
    lowers = options.lower_order_final
    weights = _of_epsilon if epsilon else _simple_second
    value = EPS if epsilon else X0
    correction = 0.0  # weight of the newest value
    for i, (sigma, after) in enumerate(itertools.pairwise(program.sigmas)):
        tau = (options.eta or 0.0) * float(200 <= grid.timesteps[i] <= 800)
        order = min(predicts, i + 1, n - i if lowers else n)
        after_order = min(corrects, i + 2, n - i + 1 if lowers else n + 1)
        corrected = X + correction * value + (Y if correction else 0.0 * Y)
        correction = _take(
            *(program, i, sigma, after, corrected, value, weights),
            *(tau, order, 0 if i + 1 == n else after_order),
        )
    return program.calls(draws=np.ones(n, bool))


def with_interval(grid: Grid, options: SamplerOptions, *, again: bool = False) -> Calls:
    """As ComfyUI has it: tau is eta at levels between those of 20 % and 80 % of the schedule.

    Args:
        again: call the model at the corrected state too ("PECE").
    """
    if grid.levels is None:
        checks.fail("grid", "one of a schedule, for SA-Solver", "noise levels alone")
    program, n = Program(grid, options), len(grid)
    predicts, corrects = options.predictor_order or 1, options.corrector_order or 1
    ends = program.sigmas[-1] == 0
    last_t = len(grid.levels) - 1
    low, high = (grid.level_of(share * last_t) for share in (0.2, 0.8))
    correction = 0.0
    for i, (sigma, after) in enumerate(itertools.pairwise(program.sigmas)):
        corrected = X + correction * X0 + (Y if correction else 0.0 * Y)
        if again and correction:
            program.call(i, sigma, sigma, corrected, history=None)
            corrected = X
        if after == 0:
            program.call(i, sigma, after, X0)
            continue
        tau = (options.eta or 0.0) * float(low <= after <= high)
        order = min(predicts, i + 1, n - 1 - i if ends else n)
        after_order = min(corrects, i + 2, n - 1 - i if ends else n)
        if i + 1 == n or (ends and i + 2 == n and not again):
            after_order = 0
        correction = _take(
            *(program, i, sigma, after, corrected, X0, _exact), *(tau, order, after_order)
        )
    return program.calls()


def _take(
    program: Program,
    i: int,
    sigma: float,
    after: float,
    corrected: Sum,
    value: Sum,
    weights: Weights,
    tau: float,
    order: int,
    after_order: int,
) -> float:
    """The predictor's step from the corrected state, with y for the next correction.

    Args:
        value: x_0 or epsilon, whose polynomial is integrated.
        order: the predictor's.
        after_order: that of the corrector of this step; 0 for none.

    Returns:
        The weight of the next call's value in the correction.
    """
    if after == 0 or math.isclose(sigma, after, rel_tol=1e-12):
        program.call(i, sigma, after, X0 if after == 0 else corrected, history=value)
        return 0.0
    h, values = math.log(sigma / after), (value, *HISTORY)
    past = [math.log(sigma / s) for s in program.sigmas[i::-1]]  # 0 and below, newest first
    if value is EPS:
        decay, spread = 1.0, tau * math.sqrt(sigma**2 - after**2)
    else:
        decay = math.exp(-(tau**2) * h) * after / sigma
        spread = after * math.sqrt(-math.expm1(-2 * tau**2 * h))
    predictor = weights(past[:order], h, after, tau)
    state = decay * corrected + program.s_noise * spread * Z
    state = sum((w * one for w, one in zip(predictor, values, strict=False)), state)
    if not after_order:
        program.call(i, sigma, after, state, history=value)
        return 0.0
    new, *corrector = weights([h, *past[: after_order - 1]], h, after, tau)
    change = np.zeros(4)
    change[: len(corrector)] += corrector
    change[: len(predictor)] -= predictor
    kept = sum((w * one for w, one in zip(change, values, strict=True)), 0.0 * X)
    program.call(i, sigma, after, state, y=kept, history=value)
    return float(new)


def _exact(nodes: Sequence[float], h: float, after: float, tau: float) -> FloatArray:
    """p integral of exp(p (v - h)) L_k."""
    p = 1 + tau**2
    return p * lagrange_integrals(nodes, 0.0, h, lambda v: np.exp(p * (v - h)))


def _simple_second(nodes: Sequence[float], h: float, after: float, tau: float) -> FloatArray:
    """The same, but simpler rules of second order (the paper's appendix D)."""
    if len(nodes) != 2:
        return _exact(nodes, h, after, tau)
    p = 1 + tau**2
    other = 0.5 * p * h if nodes[0] == h else -math.expm1(-p * h) - 0.5 * p * h**2 / nodes[1]
    return np.array([other, -math.expm1(-p * h) - other])


def _of_epsilon(nodes: Sequence[float], h: float, after: float, tau: float) -> FloatArray:
    """-p sigma' integral of exp(h - v) L_k."""
    p = 1 + tau**2
    return -p * after * lagrange_integrals(nodes, 0.0, h, lambda v: np.exp(h - v))


_OPTIONS = {"eta": 1.0, "s_noise": 1.0}
_DIFFUSERS = {**_OPTIONS, "predictor_order": 2, "corrector_order": 2, "lower_order_final": True}
_COMFYUI = {**_OPTIONS, "predictor_order": 3, "corrector_order": 4}

SAMPLERS = (
    *(
        Sampler(
            name,
            first_level_grid,
            partial(calls, epsilon=kind == "noise_prediction"),
            options=_DIFFUSERS,
            diffusers=(DiffusersName("SASolverScheduler", {"algorithm_type": kind}),),
        )
        for name, kind in (
            ("sa_solver_diffusers", "data_prediction"),
            ("sa_solver_noise", "noise_prediction"),
        )
    ),
    Sampler("sa_solver", sigma_grid, with_interval, options=_COMFYUI, comfyui="sa_solver"),
    Sampler(
        "sa_solver_pece",
        sigma_grid,
        partial(with_interval, again=True),
        calls_per_step=2,
        options=_COMFYUI,
        comfyui="sa_solver_pece",
    ),
)
