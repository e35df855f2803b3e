"""DPM-Solver (Lu et al. 2022, arXiv:2206.00927), multistep, and its SDE form: noise prediction.

In lambda = log(A / S) a step of length h solves, exactly in the linear part (proposition 3.1),

    x' = A'/A x - S' * integral over tau in [0, h] of exp(h - tau) epsilon(lambda + tau)

with epsilon replaced by a polynomial through the last few predictions, which are the history.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..ops import checks
from ..prediction import epsilon_coefficients
from ..schedule import FloatArray
from .dpm_solver import FEW_STEPS
from .grids import Grid, solver_grid
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions


def calls(
    grid: Grid, options: SamplerOptions, order: int, *, sde: bool = False, exact: bool = False
) -> Calls:
    """Order 1, 2 or 3 (the SDE form has no third), with the polynomials of diffusers.

    Args:
        sde: add the posterior's noise.
        exact: integrate the slope of order 2 exactly, in place of the midpoint rule ("heun").

    A step to no noise is of first order.

    Raises:
        ValueError: x_0 is to be clipped.
    """
    if options.clip < np.inf:
        expected = f"False for {options.sampler}, whose steps go by epsilon"
        checks.fail("clip_sample", expected, options.clip_sample)
    n = len(grid)
    orders = np.minimum(order, np.arange(1, n + 1))
    if options.lower_order_final and options.steps is not None and options.steps < FEW_STEPS:
        orders[-2:] = np.minimum(orders[-2:], [2, 1][-n:])
    if grid.next_noise[-1] == 0 or options.euler_at_final:
        orders[-1] = 1
    with np.errstate(divide="ignore"):
        lam = np.log(grid.signal / grid.noise)
        h = -np.log(grid.ratio)
    # S' (exp(h) - 1), finite for a step to no noise
    whole = grid.next_signal * grid.noise / grid.signal - grid.next_noise
    twice = 2.0 if sde else 1.0
    weights = np.zeros((n, 3))  # of epsilon now and before
    weights[:, 0] = -twice * whole

    i = np.flatnonzero(orders >= 2)
    slope = _differences(1 / (lam[i] - lam[i - 1]))
    ramp = whole[i] - grid.next_noise[i] * h[i]  # S' (exp(h) - 1 - h)
    factor = np.where((orders[i] == 3) | exact, ramp, 0.5 * whole[i] * h[i])
    third = orders[i] == 3
    if third.any():
        j = i[third]
        h_0, h_1 = lam[j] - lam[j - 1], lam[j - 1] - lam[j - 2]
        older = np.roll(_differences(1 / h_1), 1, axis=1)
        second = (slope[third] - older) / (h_0 + h_1)[:, None]
        slope[third] += h_0[:, None] * second
        bend = whole[j] - grid.next_noise[j] * (h[j] + h[j] ** 2 / 2)
        weights[j] -= bend[:, None] * second
    weights[i] -= twice * factor[:, None] * slope

    e_x, e_m = epsilon_coefficients(options.prediction_type, grid.signal, grid.noise)
    noise: FloatArray | float = 0.0
    if sde:
        eps_noise = np.square(grid.next_signal * grid.noise / grid.signal) - grid.next_noise**2
        noise = (options.s_noise or 0.0) * np.sqrt(np.maximum(eps_noise, 0))
    return Calls.one_per_step(
        grid,
        c_x=grid.next_signal / grid.signal + weights[:, 0] * e_x,
        c_m=weights[:, 0] * e_m,
        c_1=weights[:, 1],
        c_2=weights[:, 2],
        s=noise,
        e_x=e_x,
        e_0=0.0,
        e_m=e_m,
    )


def _differences(inverse: FloatArray) -> FloatArray:
    """[k, 3] weights of (epsilon - h1) * inverse."""
    return inverse[:, None] * np.array([1.0, -1.0, 0.0])


def _sampler(name: str, order: int, *solver_types: str, sde: bool = False) -> Sampler:
    algorithm = "sde-dpmsolver" if sde else "dpmsolver"
    settings = {"algorithm_type": algorithm, "solver_order": order}
    noise = {"s_noise": 1.0} if sde else {}
    return Sampler(
        name,
        solver_grid,
        partial(calls, order=order, sde=sde, exact=solver_types == ("heun",)),
        options={"lower_order_final": True, "euler_at_final": False, **noise},
        diffusers=tuple(
            DiffusersName("DPMSolverMultistepScheduler", {**settings, "solver_type": kind})
            for kind in solver_types
        ),
    )


SAMPLERS = (
    _sampler("dpm_solver_1", 1, "midpoint", "heun"),
    _sampler("dpm_solver_2m", 2, "midpoint"),
    _sampler("dpm_solver_2m_heun", 2, "heun"),
    _sampler("dpm_solver_3m", 3, "midpoint", "heun"),
    _sampler("dpm_solver_1_sde", 1, "midpoint", "heun", sde=True),
    _sampler("dpm_solver_2m_sde", 2, "midpoint", sde=True),
    _sampler("dpm_solver_2m_sde_heun", 2, "heun", sde=True),
)
