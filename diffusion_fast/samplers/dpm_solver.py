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
        sde: add noise, eta times as fast as the posterior's.
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
    eta = (options.eta or 0.0) if sde else 0.0
    pace = 1 + eta
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
    integral_1 = h[i] - integral_0[i] / pace  # of pace exp(pace (tau - h)) tau
    integral_2 = h[i] ** 2 / 2 - integral_1 / pace  # of the same with tau^2 / 2
    weights[i] += integral_1[:, None] * (recent + h_0[:, None] * second)
    weights[i] += (integral_2 if halved_curvature else 2 * integral_2)[:, None] * second

    c_0, c_1, c_2 = (grid.next_signal[:, None] * weights).T
    c_x = grid.next_noise / grid.noise
    if not sde:
        return Calls.one_per_step(grid, c_x=c_x, c_0=c_0, c_1=c_1, c_2=c_2)
    decay = grid.ratio**eta  # exp(-eta h)
    noise = (options.s_noise or 0.0) * grid.next_noise * np.sqrt(np.maximum(1 - decay**2, 0))
    return Calls.one_per_step(grid, c_x=c_x * decay, c_0=c_0, c_1=c_1, c_2=c_2, s=noise)


def _differences(inverse: FloatArray) -> FloatArray:
    """[k, 3] weights of (x0 - h1) * inverse."""
    return inverse[:, None] * np.array([1.0, -1.0, 0.0])


NOISE = {"eta": 1.0, "s_noise": 1.0}


def _sampler(
    name: str,
    order: int,
    *solver_types: str,
    sde: bool = False,
    exact: bool = False,
    halved_curvature: bool = False,
    nearest: bool = False,
    a1111: str | None = None,
) -> Sampler:
    """``solver_types``: those of diffusers that mean this sampler, or the nearest to it."""
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    settings = {"algorithm_type": algorithm, "solver_order": order}
    return Sampler(
        name,
        solver_grid,
        partial(calls, order=order, sde=sde, exact=exact, halved_curvature=halved_curvature),
        options={"lower_order_final": True, "euler_at_final": False, **(NOISE if sde else {})},
        diffusers=tuple(
            DiffusersName("DPMSolverMultistepScheduler", {**settings, "solver_type": kind}, nearest)
            for kind in solver_types
        ),
        comfyui=name if a1111 else None,
        k_diffusion=a1111 is not None and not (sde and exact and order == 2),
        a1111=a1111,
    )


SAMPLERS = (
    _sampler("dpmpp_1", 1, "midpoint", "heun"),
    _sampler("dpmpp_2m", 2, "midpoint", a1111="DPM++ 2M"),
    _sampler("dpmpp_2m_heun", 2, "heun", exact=True),
    _sampler("dpmpp_3m", 3, "midpoint", nearest=True),
    _sampler("dpmpp_3m_diffusers", 3, "midpoint", "heun", halved_curvature=True),
    _sampler("dpmpp_1_sde", 1, "midpoint", "heun", sde=True),
    _sampler("dpmpp_2m_sde", 2, "midpoint", sde=True, a1111="DPM++ 2M SDE"),
    _sampler("dpmpp_2m_sde_heun", 2, "heun", sde=True, exact=True, a1111="DPM++ 2M SDE Heun"),
    _sampler(
        "dpmpp_3m_sde",
        3,
        "heun",
        sde=True,
        exact=True,
        halved_curvature=True,
        nearest=True,
        a1111="DPM++ 3M SDE",
    ),
)
