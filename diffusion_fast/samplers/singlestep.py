"""DPM-Solver++ and DPM-Solver, singlestep (Lu et al. 2022, arXiv:2211.01095, arXiv:2206.00927).

A step of order k takes k model calls, all but the first at levels within it, and forgets what was
before.
"""

from __future__ import annotations

import math
from functools import partial

from .grids import Grid, sigma_grid, solver_grid
from .program import EPS, H1, H2, X0, Program, X, Y, Z, ancestral_step
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions


def calls(
    grid: Grid,
    options: SamplerOptions,
    order: int,
    *,
    exact: bool = False,
    epsilon: bool = False,
    sde: bool = False,
) -> Calls:
    """The grid's levels in groups of ``order``; the last groups are smaller as diffusers has it.

    Args:
        exact: integrate the polynomial exactly ("heun"), else by the midpoint rule.
        epsilon: predict noise (DPM-Solver), else data (DPM-Solver++).
        sde: add the posterior's noise at each call.
    """
    program, n = Program(grid, options), len(grid)
    total = max(options.steps or n, n)
    lowers = options.lower_order_final or program.sigmas[-1] == 0 or total % order != 0
    orders = _orders(total, order, bool(lowers))
    if program.sigmas[-1] == 0:
        orders[-1] = 1
    value = EPS if epsilon else X0
    start = 0  # of the group
    for i, sigma, after in program.steps():
        this = min(orders[total - n + i], i + 1)
        start = i if this == 1 else start
        first = program.sigmas[i - this + 1]
        h = math.log(first / after) if after else math.inf
        # of the state; and integrals of the polynomials 1, u and u^2 / 2 over the step
        if epsilon:
            keep, whole = 1.0, after - first
            ramp = whole / h + after
            bend = (whole + after * h) / h**2 + after / 2 if after else 0.0
        else:
            keep, pace = (after / first) ** (2 if sde else 1), 2.0 if sde else 1.0
            whole = 1 - keep
            ramp = 1 - whole / (pace * h)
            bend = 0.5 - (h - whole) / h**2 if after else 0.0
        noise = program.s_noise * after * math.sqrt(1 - keep) * Z if sde else 0.0 * Z
        if this == 1:
            state = keep * X + whole * value + noise
            program.call(i, sigma, after, state, y=X, history=value)
            continue
        r_0 = math.log(first / sigma) / h
        state = keep * Y + whole * (H1 if this == 2 else H2) + noise
        if this == 2:
            change = 1 / r_0 * (value - H1)
            state = state + (ramp if exact else 0.5 * whole) * change
        else:
            r_1 = math.log(first / program.sigmas[i - 1]) / h
            near, far = 1 / r_1 * (H1 - H2), 1 / r_0 * (value - H2)
            if exact:
                gradient = 1 / (r_0 - r_1) * (r_0 * near - r_1 * far)
                curvature = 2 / (r_0 - r_1) * (far - near)
                state = state + ramp * gradient + bend * curvature
            else:
                state = state + ramp * far
        program.call(i, sigma, after, state, y=Y, history=value)
    return program.calls()


def _orders(steps: int, order: int, lowers: bool) -> list[int]:
    """The order of each call's solution, 1 to k in groups of k; the last two calls end lower."""
    rest = steps % order
    group = list(range(1, order + 1))
    if order == 1:
        return [1] * steps
    if rest:
        return group * (steps // order) + group[:rest]
    if not lowers:
        return group * (steps // order)
    return group * (steps // order - 1) + ([1, 1] if order == 2 else [1, 2, 1])


def fast(grid: Grid, options: SamplerOptions) -> Calls:
    """DPM-Solver-fast (Lu et al. 2022, arXiv:2206.00927, section 3.4): n calls in steps of order 3
    evenly spaced in log sigma, and one or two of lower order, down to the lowest noise level."""
    program, count = Program(grid, options), len(grid)
    high = program.sigmas[0]
    low = float(grid.levels[0]) if grid.levels is not None else program.sigmas[-1]
    low = low or program.sigmas[-2]
    m = count // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if count % 3 == 0 else [3] * (m - 1) + [count % 3]
    levels = [high * (low / high) ** (k / m) for k in range(m + 1)]
    i = 0  # of the call: each counts as a step
    for k, order in enumerate(orders):
        sigma, after = levels[k], levels[k + 1]
        down = max(ancestral_step(sigma, after, program.eta)[0], low)
        noise = program.s_noise * math.sqrt(max(after**2 - down**2, 0.0)) * Z
        h = math.log(sigma / down)
        if order == 1:
            program.call(i, sigma, after, X + (down - sigma) * EPS + noise)
        elif order == 2:
            middle = math.sqrt(sigma * down)
            program.call(i, sigma, middle, X + (middle - sigma) * EPS, y=X)
            program.call(i + 1, middle, after, Y + (down - sigma) * EPS + noise)
        else:
            one, two = sigma * math.exp(-h / 3), sigma * math.exp(-2 * h / 3)
            program.call(i, sigma, one, X + (one - sigma) * EPS, y=X)
            slope, third = 1 / sigma * (Y - H1), 2 * h / 3
            bend = 2 * two * (math.expm1(third) / third - 1)
            state = Y + (two - sigma) * slope - bend * (EPS - slope)
            program.call(i + 1, one, two, state, y=Y)
            slope = 1 / sigma * (Y - H2)
            bend = 1.5 * down * (math.expm1(h) / h - 1)
            state = Y + (down - sigma) * slope - bend * (EPS - slope)
            program.call(i + 2, two, after, state + noise)
        i += order
    return program.calls()


def _sampler(
    name: str,
    order: int,
    *solver_types: str,
    exact: bool = False,
    epsilon: bool = False,
    sde: bool = False,
) -> Sampler:
    algorithm = "dpmsolver" if epsilon else "sde-dpmsolver++" if sde else "dpmsolver++"
    settings = {"algorithm_type": algorithm, "solver_order": order}
    return Sampler(
        name,
        solver_grid,
        partial(calls, order=order, exact=exact, epsilon=epsilon, sde=sde),
        options={"lower_order_final": True, **({"s_noise": 1.0} if sde else {})},
        diffusers=tuple(
            DiffusersName("DPMSolverSinglestepScheduler", {**settings, "solver_type": kind})
            for kind in solver_types
        ),
    )


SAMPLERS = (
    _sampler("dpmpp_1s", 1, "midpoint", "heun"),
    _sampler("dpmpp_2s", 2, "midpoint"),
    _sampler("dpmpp_2s_heun", 2, "heun", exact=True),
    _sampler("dpmpp_3s", 3, "midpoint"),
    _sampler("dpmpp_3s_heun", 3, "heun", exact=True),
    _sampler("dpmpp_1s_sde", 1, "midpoint", "heun", sde=True),
    _sampler("dpmpp_2s_sde", 2, "midpoint", sde=True),
    _sampler("dpmpp_2s_sde_heun", 2, "heun", exact=True, sde=True),
    _sampler("dpmpp_3s_sde", 3, "midpoint", sde=True),
    _sampler("dpm_solver_1s", 1, "midpoint", "heun", epsilon=True),
    _sampler("dpm_solver_2s", 2, "midpoint", epsilon=True),
    _sampler("dpm_solver_2s_heun", 2, "heun", exact=True, epsilon=True),
    _sampler("dpm_solver_3s", 3, "midpoint", epsilon=True),
    _sampler("dpm_solver_3s_heun", 3, "heun", exact=True, epsilon=True),
    Sampler(
        "dpm_fast",
        sigma_grid,
        fast,
        options={"eta": 0.0, "s_noise": 1.0},
        comfyui="dpm_fast",
        a1111="DPM fast",
        k_diffusion=True,
    ),
)
