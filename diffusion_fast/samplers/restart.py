"""Heun's method that goes back up, and Heun++."""

from __future__ import annotations

import itertools
import math

import numpy as np

from .grids import SIGMAS, Grid, sigma_grid
from .program import EPS, Program, X, Y, Z
from .sampler import CHURN, Calls, Sampler, SamplerOptions


def restart(grid: Grid, options: SamplerOptions) -> Calls:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878), with AUTOMATIC1111's choices.

    From 20 steps on, some of them are taken again: from sigma near 2 to sigma near 0.1, after noise
    that leads back up. The levels are Karras' between the grid's highest and lowest.
    """
    program = Program(grid, options)
    pairs = _pairs(program.sigmas)
    for i, (sigma, after) in enumerate(pairs):
        following = pairs[i + 1][0] if i + 1 < len(pairs) else after
        up = program.s_noise * math.sqrt(max(following**2 - after**2, 0.0))
        half = 0.5 * (after - sigma)
        if after == 0:
            program.call(i, sigma, after, X + (after - sigma) * EPS)
            continue
        program.call(i, sigma, after, X + (after - sigma) * EPS, y=X + half * EPS)
        program.call(i, after, following, Y + half * EPS + up * Z)
    return program.calls()


def _pairs(sigmas: list[float]) -> list[tuple[float, float]]:
    """(start, end) of each step."""
    steps = len(sigmas) - 1
    again, times = (0, 0) if steps < 20 else (9, 1) if steps < 36 else (steps // 4, 2)
    if again:
        low = sigmas[-1] or sigmas[-2]
        sigmas = [*_karras(low, sigmas[0], steps - again * times), 0.0]
    pairs = list(itertools.pairwise(sigmas))
    bottom, top = (int(np.argmin(np.abs(np.array(sigmas) - level))) for level in (0.1, 2.0))
    if again and top < bottom:
        climb = _karras(sigmas[bottom], sigmas[top], again + 1)
        repeated = list(itertools.pairwise(climb)) * times
        pairs[bottom:bottom] = repeated
    return pairs


def _karras(low: float, high: float, count: int) -> list[float]:
    return [float(v) for v in SIGMAS["karras"].levels(low, high, np.linspace(0, 1, count))]


def heunpp2(grid: Grid, options: SamplerOptions) -> Calls:
    """Heun++: slopes at up to three levels, weighted by noise level."""
    program = Program(grid, options)
    sigmas, n = program.sigmas, len(grid)
    for i, sigma, after in program.steps():
        dt, (level, noise) = after - sigma, program.raised(i)
        if i + 1 == n:
            program.call(i, sigma, after, X + dt * EPS)
            continue
        calls = 2 if i + 2 == n else 3
        later = sigmas[i + 1 : i + calls]
        weights = [level / (calls * sigmas[0]) for level in later]
        program.call(i, sigma, after, X + dt * EPS, y=X + (1 - sum(weights)) * dt * EPS)
        if calls == 3:
            further = X + (later[1] - after) * EPS
            program.call(i, after, later[1], further, y=Y + weights[0] * dt * EPS)
        program.call(i, later[-1], level, Y + weights[-1] * dt * EPS + noise)
    return program.calls()


SAMPLERS = (
    Sampler(
        "restart",
        sigma_grid,
        restart,
        calls_per_step=2,
        options={"s_noise": 1.0},
        a1111="Restart",
    ),
    Sampler("heunpp2", sigma_grid, heunpp2, calls_per_step=3, options=CHURN, comfyui="heunpp2"),
)
