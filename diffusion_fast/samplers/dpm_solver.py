"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), multistep, data prediction.

In lambda = log(A / S) a step of length h solves, exactly in the linear part (proposition 4.1),

    x' = S'/S x + A' * integral over tau in [0, h] of exp(tau - h) x_0(lambda + tau)

with x_0 replaced by a polynomial through the last few predictions. The SDE version
(SDE-DPM-Solver++ in the paper) has 2h for h inside the integral, and adds noise.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..schedule import FloatArray
from .grids import Grid, solver_grid
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions

FEW_STEPS = 15  # below which lower_order_final counts


def calls(
    grid: Grid,
    options: SamplerOptions,
    order: int,
    *,
    sde: bool = False,
    exact: bool = False,
    halved_curvature: bool = False,
) -> Calls:
    """DPM-Solver++ of order 1, 2 (2M) or 3 (3M); warm-up rows have the order that history allows.

    Args:
        sde: add the posterior's noise (orders 1 and 2).
        exact: integrate the slope of order 2 exactly, in place of the midpoint rule ("heun").
        halved_curvature: take the second difference for the second derivative, which lacks a
            factor 2, as diffusers does for order 3. The order of convergence falls from 3 to 2.

    A step to no noise is of first order always.
    """
    n = len(grid)
    orders = np.minimum(order, np.arange(1, n + 1))
    if options.lower_order_final and options.steps is not None and options.steps < FEW_STEPS:
        orders[-2:] = np.minimum(orders[-2:], [2, 1][-n:])
    if grid.next_noise[-1] == 0 or options.euler_at_final:
        orders[-1] = 1

    with np.errstate(divide="ignore"):
        lam = np.log(grid.signal / grid.noise)
        h = -np.log(grid.ratio)  # infinite for a step to no noise
    pace = 2.0 if sde else 1.0
    integral_0 = -np.expm1(-pace * h)  # of pace exp(pace (tau - h))
    weights = np.zeros((n, 3))  # of x0, h1, h2 in the integral
    weights[:, 0] = integral_0

    i = np.flatnonzero(orders == 2)
    slope = _differences(1 / (lam[i] - lam[i - 1]))
    factor = h[i] - integral_0[i] / pace if exact else 0.5 * integral_0[i] * h[i]
    weights[i] += factor[:, None] * slope

    i = np.flatnonzero(orders == 3)
    h_0, h_1 = lam[i] - lam[i - 1], lam[i - 1] - lam[i - 2]
    recent, older = _differences(1 / h_0), np.roll(_differences(1 / h_1), 1, axis=1)
    second = (recent - older) / (h_0 + h_1)[:, None]  # divided difference: half a curvature
    integral_1 = h[i] - integral_0[i]  # of exp(tau - h) tau
    integral_2 = h[i] ** 2 / 2 - integral_1  # of exp(tau - h) tau^2 / 2
    weights[i] += integral_1[:, None] * (recent + h_0[:, None] * second)
    weights[i] += (integral_2 if halved_curvature else 2 * integral_2)[:, None] * second

    c_0, c_1, c_2 = (grid.next_signal[:, None] * weights).T
    c_x = grid.next_noise / grid.noise
    if sde:
        noise = grid.posterior_std
        return Calls.one_per_step(grid, c_x=c_x * grid.ratio, c_0=c_0, c_1=c_1, c_2=c_2, s=noise)
    return Calls.one_per_step(grid, c_x=c_x, c_0=c_0, c_1=c_1, c_2=c_2)


def _differences(inverse: FloatArray) -> FloatArray:
    """[k, 3] weights of (x0 - h1) * inverse."""
    return inverse[:, None] * np.array([1.0, -1.0, 0.0])


def _sampler(
    name: str,
    order: int,
    *solver_types: str,
    sde: bool = False,
    exact: bool = False,
    halved_curvature: bool = False,
    nearest: bool = False,
) -> Sampler:
    """``solver_types``: those of diffusers that mean this sampler, or the nearest to it."""
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    settings = {"algorithm_type": algorithm, "solver_order": order}
    return Sampler(
        name,
        solver_grid,
        partial(calls, order=order, sde=sde, exact=exact, halved_curvature=halved_curvature),
        options={"lower_order_final": True, "euler_at_final": False},
        diffusers=tuple(
            DiffusersName("DPMSolverMultistepScheduler", {**settings, "solver_type": kind}, nearest)
            for kind in solver_types
        ),
    )


SAMPLERS = (
    _sampler("dpmpp_1", 1, "midpoint", "heun"),
    _sampler("dpmpp_2m", 2, "midpoint"),
    _sampler("dpmpp_2m_heun", 2, "heun", exact=True),
    _sampler("dpmpp_3m", 3, "midpoint", nearest=True),
    _sampler("dpmpp_3m_diffusers", 3, "midpoint", "heun", halved_curvature=True),
    _sampler("dpmpp_1_sde", 1, "midpoint", "heun", sde=True),
    _sampler("dpmpp_2m_sde", 2, "midpoint", sde=True),
    _sampler("dpmpp_2m_sde_heun", 2, "heun", sde=True, exact=True),
)
