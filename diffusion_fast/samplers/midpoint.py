"""Samplers of two and more model calls in a step, between the grid's noise levels.

DPM-Solver-2 as Karras et al. (2022, arXiv:2206.00364) write it, DPM-Solver++(2S) and its SDE form
(Lu et al. 2022, arXiv:2211.01095), SEEDS (Gonzalez et al. 2023, arXiv:2305.14267); as in Crowson's
k-diffusion and in ComfyUI.
"""

from __future__ import annotations

import math
from functools import partial

from .grids import Grid, sigma_grid
from .program import EPS, H1, H2, X0, Program, X, Y, Z, ancestral_step, toward
from .sampler import CHURN, Calls, DiffusersName, Sampler, SamplerOptions


def dpm_2(grid: Grid, options: SamplerOptions) -> Calls:
    """The slope at the geometric mean of both levels; ancestral with eta > 0."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        down, up = ancestral_step(sigma, after, program.eta)
        level, churn = program.raised(i)
        noise = program.s_noise * up * Z + churn
        if down == 0:
            program.call(i, sigma, after, X + (after - sigma) * EPS)
            continue
        middle = math.sqrt(sigma * down)
        program.call(i, sigma, middle, X + (middle - sigma) * EPS, y=X)
        program.call(i, middle, level, Y + (down - sigma) * EPS + noise)
    return program.calls()


def dpmpp_2s_ancestral(grid: Grid, options: SamplerOptions) -> Calls:
    """x_0 at the geometric mean of both levels, in the exact solution's linear form."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        down, up = ancestral_step(sigma, after, program.eta)
        noise = program.s_noise * up * Z
        if down == 0:
            program.call(i, sigma, after, X + (after - sigma) * EPS)
            continue
        middle = math.sqrt(sigma * down)
        program.call(i, sigma, middle, toward(X, X0, sigma, middle), y=X)
        program.call(i, middle, after, toward(Y, X0, sigma, down) + noise)
    return program.calls()


def dpmpp_sde(grid: Grid, options: SamplerOptions) -> Calls:
    """Both noises lie on one Brownian path in sigma: the second step's is that of the first, which
    the state holds beside what was kept, and that of the second half."""
    program = Program(grid, options)
    eta, s_noise = program.eta, program.s_noise
    for i, sigma, after in program.steps():
        if after == 0:
            program.call(i, sigma, after, X0)
            continue
        middle = math.sqrt(sigma * after)
        down, up = ancestral_step(sigma, middle, eta)
        quiet = toward(X, X0, sigma, down)
        program.call(i, sigma, middle, quiet + s_noise * up * Z, y=X)
        quiet = toward(Y, H1, sigma, down)  # the state without its noise
        last, up_2 = ancestral_step(sigma, after, eta)
        first, second = (
            math.sqrt(part / (sigma - after)) for part in (sigma - middle, middle - after)
        )
        noise = s_noise * up_2 * second * Z
        if s_noise * up:
            noise = noise + up_2 * first / up * (X - quiet)
        program.call(i, middle, after, toward(Y, X0, sigma, last) + noise)
    return program.calls()


def seeds_2(grid: Grid, options: SamplerOptions, *, r: float, exact: bool) -> Calls:
    """SEEDS-2: exponential Runge-Kutta in log-SNR, with the noise of one path.

    Args:
        r: where in a step the second call is; 1 is Heun's method.
        exact: integrate the slope of x_0 exactly ("phi_2"), else by one rule ("phi_1").
    """
    program = Program(grid, options)
    eta, s_noise = program.eta, program.s_noise
    for i, sigma, after in program.steps():
        if after == 0:
            program.call(i, sigma, after, X0)
            continue
        h = math.log(sigma / after)
        middle = sigma * math.exp(-r * h)
        pace = h * (1 + eta)
        quiet = math.exp(-r * pace) * X - math.expm1(-r * pace) * X0
        up = middle * math.sqrt(-math.expm1(-2 * r * h * eta))
        program.call(i, sigma, middle, quiet + s_noise * up * Z, y=X)
        quiet = math.exp(-r * pace) * Y - math.expm1(-r * pace) * H1
        weight = 1 / (2 * r)
        if exact:
            weight = _phi_2(-pace) / r / math.expm1(-pace)
        mean = (1 - weight) * H1 + weight * X0
        state = math.exp(-pace) * Y - math.expm1(-pace) * mean
        if s_noise and eta:
            rest = (r - 1) * h * eta
            state = state + after / middle * math.exp(rest) * (X - quiet)
            state = state + s_noise * after * math.sqrt(-math.expm1(2 * rest)) * Z
        program.call(i, middle, after, state)
    return program.calls()


def _phi_2(h: float) -> float:
    return (math.expm1(h) - h) / h


def seeds_3(grid: Grid, options: SamplerOptions) -> Calls:
    """SEEDS-3: three calls a step, at one and two thirds of it."""
    program = Program(grid, options)
    eta, s_noise = program.eta, program.s_noise
    r_1, r_2 = 1 / 3, 2 / 3
    for i, sigma, after in program.steps():
        if after == 0:
            program.call(i, sigma, after, X0)
            continue
        h = math.log(sigma / after)
        pace, between = h * (1 + eta), h * eta / 3
        first, second = sigma * math.exp(-r_1 * h), sigma * math.exp(-r_2 * h)
        spread = s_noise * math.sqrt(-math.expm1(-2 * between))  # of a third's noise, per level
        decay = math.exp(-between)

        quiet = math.exp(-r_1 * pace) * X - math.expm1(-r_1 * pace) * X0
        program.call(i, sigma, first, quiet + first * spread * Z, y=X)

        # The noise so far is what the state holds beside its quiet value.
        so_far = X - (math.exp(-r_1 * pace) * Y - math.expm1(-r_1 * pace) * H1)
        a_2 = r_2 / r_1 * _phi_2(-r_2 * pace)
        a_1 = math.expm1(-r_2 * pace) - a_2
        quiet = math.exp(-r_2 * pace) * Y - a_1 * H1 - a_2 * X0
        noise = second * spread * Z
        if program.eta:
            noise = noise + second / first * decay * so_far
        program.call(i, first, second, quiet + noise, y=Y)

        b_3 = _phi_2(-pace) / r_2
        b_1 = math.expm1(-pace) - b_3
        so_far = X - (math.exp(-r_2 * pace) * Y - a_1 * H2 - a_2 * H1)
        quiet = math.exp(-pace) * Y - b_1 * H2 - b_3 * X0
        noise = after * spread * Z
        if program.eta:
            noise = noise + after / second * decay * so_far
        program.call(i, second, after, quiet + noise)
    return program.calls()


_STOCHASTIC = {"eta": 1.0, "s_noise": 1.0}

SAMPLERS = (
    Sampler(
        "dpm_2",
        sigma_grid,
        dpm_2,
        calls_per_step=2,
        options=CHURN,
        diffusers=(DiffusersName("KDPM2DiscreteScheduler"),),
        comfyui="dpm_2",
        a1111="DPM2",
        k_diffusion=True,
        drops_penultimate=True,
    ),
    Sampler(
        "dpm_2_ancestral",
        sigma_grid,
        dpm_2,
        calls_per_step=2,
        options=_STOCHASTIC,
        diffusers=(DiffusersName("KDPM2AncestralDiscreteScheduler"),),
        comfyui="dpm_2_ancestral",
        a1111="DPM2 a",
        k_diffusion=True,
        drops_penultimate=True,
    ),
    Sampler(
        "dpmpp_2s_ancestral",
        sigma_grid,
        dpmpp_2s_ancestral,
        calls_per_step=2,
        options=_STOCHASTIC,
        comfyui="dpmpp_2s_ancestral",
        a1111="DPM++ 2S a",
        k_diffusion=True,
    ),
    Sampler(
        "dpmpp_sde",
        sigma_grid,
        dpmpp_sde,
        calls_per_step=2,
        options=_STOCHASTIC,
        diffusers=(DiffusersName("DPMSolverSDEScheduler"),),
        comfyui="dpmpp_sde",
        a1111="DPM++ SDE",
        k_diffusion=True,
    ),
    Sampler(
        "seeds_2",
        sigma_grid,
        partial(seeds_2, r=0.5, exact=False),
        calls_per_step=2,
        options=_STOCHASTIC,
        comfyui="seeds_2",
    ),
    Sampler(
        "seeds_3", sigma_grid, seeds_3, calls_per_step=3, options=_STOCHASTIC, comfyui="seeds_3"
    ),
    Sampler(
        "exp_heun_2_x0",
        sigma_grid,
        partial(seeds_2, r=1.0, exact=True),
        calls_per_step=2,
        comfyui="exp_heun_2_x0",
    ),
    Sampler(
        "exp_heun_2_x0_sde",
        sigma_grid,
        partial(seeds_2, r=1.0, exact=True),
        calls_per_step=2,
        options=_STOCHASTIC,
        comfyui="exp_heun_2_x0_sde",
    ),
)
