"""Heun's method of second order (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

from __future__ import annotations

import math

import numpy as np

from ..prediction import epsilon_coefficients
from .ddim import transition
from .grids import Grid, sigma_grid
from .program import EPS, Program, X, Y
from .sampler import CHURN, Calls, DiffusersName, Sampler, SamplerOptions
from .table import INDEX, coefficients


def calls(grid: Grid, options: SamplerOptions) -> Calls:
    """Two calls for each step; the last step, mostly to sigma = 0, is a single Euler step.

    With x_0 + sigma epsilon as the state, epsilon is its slope in sigma. The first call's row is
    Euler's and keeps half of the step, which the second completes with the slope at its result:

        y = x + (sigma' - sigma) / 2 epsilon        x' = y + (sigma' - sigma) / 2 epsilon'

    epsilon' comes straight from the model's output, or from the clamped x_0 if there is clipping:
    by way of x_0 all digits would cancel where sigma is large.
    """
    if options.s_churn:
        return _churning(grid, options)
    n = len(grid) - 1
    signal, noise, sigma = grid.next_signal[:n], grid.next_noise[:n], grid.sigma[:n]
    half = 0.5 * (noise - signal * sigma)  # in the variance-preserving form, of the step's end
    first = transition(grid).coefficients
    # y = A' / A x + half (x - A x_0) / S
    first[:n, INDEX["d_x"]] = signal / grid.signal[:n] + half / grid.noise[:n]
    first[:n, INDEX["d_0"]] = -half / sigma
    if options.clip < math.inf:
        e_x, e_0 = 1 / noise, -signal / noise
        second = coefficients(n, c_y=1, c_x=half * e_x, c_0=half * e_0)
    else:
        e_x, e_m = epsilon_coefficients(options.prediction_type, signal, noise)
        second = coefficients(n, c_y=1, c_x=half * e_x, c_m=half * e_m)

    rows = coefficients(2 * n + 1)
    rows[0::2], rows[1::2] = first, second
    call = np.arange(2 * n + 1)
    point, step = (call + 1) // 2, call // 2
    return Calls(
        rows,
        step,
        grid.timesteps[point],
        grid.signal[point],
        grid.noise[point],
        grid.next_signal[step],
        grid.next_noise[step],
    )


def _churning(grid: Grid, options: SamplerOptions) -> Calls:
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        level, noise = program.raised(i)
        dt = after - sigma
        if i + 1 == len(grid):
            program.call(i, sigma, level, X + dt * EPS)
            continue
        program.call(i, sigma, after, X + dt * EPS, y=X + 0.5 * dt * EPS)
        program.call(i, after, level, Y + 0.5 * dt * EPS + noise)
    return program.calls()


SAMPLERS = (
    Sampler(
        "heun",
        sigma_grid,
        calls,
        calls_per_step=2,
        options=CHURN,
        diffusers=(DiffusersName("HeunDiscreteScheduler"),),
        comfyui="heun",
        a1111="Heun",
        k_diffusion=True,
    ),
)
