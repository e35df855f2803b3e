"""Samplers with one call a step that extrapolate from the calls before, as ComfyUI has them."""

from __future__ import annotations

import math

import numpy as np

from ..schedule import FloatArray
from .grids import Grid, sigma_grid
from .program import EPS, H1, H2, U0, U_EPS, X0, Program, X, Y, Z, ancestral_step
from .sampler import Calls, Sampler, SamplerOptions


def res_multistep(grid: Grid, options: SamplerOptions, *, cfg_pp: bool = False) -> Calls:
    """RES of second order (Zhang et al. 2023, arXiv:2308.02157), ancestral with eta > 0.

    Args:
        cfg_pp: step along the unconditional output; see :mod:`.cfg_pp`.
    """
    value, slope = (U0, U_EPS) if cfg_pp else (X0, EPS)
    program, before = Program(grid, options), None
    for i, sigma, after in program.steps():
        down, up = ancestral_step(sigma, after, program.eta)
        noise = program.s_noise * up * Z if after else 0.0 * Z
        if down == 0 or before is None:
            state = X0 + down * slope if cfg_pp else X + (down - sigma) * EPS
            program.call(i, sigma, after, state + noise, history=value)
        else:
            h = math.log(sigma / down)
            c_2 = math.log(before / program.sigmas[i - 1]) / h
            phi_1 = -math.expm1(-h) / h
            phi_2 = (1 - phi_1) / h
            old = phi_2 / c_2 if c_2 else 0.0
            linear = math.exp(-h) * (X + X0 - value) + h * ((phi_1 - old) * value + old * H1)
            program.call(i, sigma, after, linear + noise, history=value)
        before = down
    return program.calls()


def gradient_estimation(
    grid: Grid, options: SamplerOptions, gamma: float = 2.0, *, cfg_pp: bool = False
) -> Calls:
    """Euler, its slope moved on by its last change (Permenter & Yuan 2024, arXiv:2306.04848).

    Args:
        cfg_pp: step along the unconditional output; see :mod:`.cfg_pp`.
    """
    program, slope = Program(grid, options), U_EPS if cfg_pp else EPS
    for i, sigma, after in program.steps():
        state = X0 + after * slope if cfg_pp else X + (after - sigma) * slope
        if i:
            state = state + (gamma - 1) * (after - sigma) * (slope - Y)
        program.call(i, sigma, after, state if after else X0, y=slope)
    return program.calls()


def er_sde(grid: Grid, options: SamplerOptions) -> Calls:
    """ER-SDE-Solver-3 (Cui et al. 2023, arXiv:2309.06169), its noise scale sigma (e^(sigma^0.3) +
    10), the integrals as sums of 200 points."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        if after == 0:
            program.call(i, sigma, after, X0)
            continue
        r = float(_scale(after) / _scale(sigma))
        state = r * X + (1 - r) * X0
        step = (sigma - after) / 200
        points = after + step * np.arange(200.0)
        slope = recent = 0.0 * X0
        if i >= 1:
            recent = (1 / (sigma - program.sigmas[i - 1])) * (X0 - H1)
            integral = float((1 / _scale(points)).sum() * step)
            slope = (after - sigma + integral * float(_scale(after))) * recent
        if i >= 2:
            last, first = program.sigmas[i - 1], program.sigmas[i - 2]
            older = (1 / (last - first)) * (H1 - H2)
            integral = float(((points - sigma) / _scale(points)).sum() * step)
            weight = (after - sigma) ** 2 / 2 + integral * float(_scale(after))
            slope = slope + (2 * weight / (sigma - first)) * (recent - older)
        noise = program.s_noise * math.sqrt(max(after**2 - (sigma * r) ** 2, 0.0))
        program.call(i, sigma, after, state + slope + noise * Z)
    return program.calls()


def _scale(sigma: float | FloatArray) -> FloatArray:
    return np.asarray(sigma * (np.exp(np.power(sigma, 0.3)) + 10.0))


def lcm(grid: Grid, options: SamplerOptions) -> Calls:
    """x_0 and fresh noise at the next level: consistency models, without boundary conditions."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        program.call(i, sigma, after, X0 + program.s_noise * after * Z)
    return program.calls()


SAMPLERS = (
    Sampler("res_multistep", sigma_grid, res_multistep, comfyui="res_multistep"),
    Sampler(
        "res_multistep_ancestral",
        sigma_grid,
        res_multistep,
        options={"eta": 1.0, "s_noise": 1.0},
        comfyui="res_multistep_ancestral",
    ),
    Sampler("gradient_estimation", sigma_grid, gradient_estimation, comfyui="gradient_estimation"),
    Sampler("er_sde", sigma_grid, er_sde, options={"s_noise": 1.0}, comfyui="er_sde"),
    Sampler("lcm_plain", sigma_grid, lcm, options={"s_noise": 1.0}, comfyui="lcm"),
)
