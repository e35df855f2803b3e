"""DDIM (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import math

import numpy as np

from ..prediction import epsilon_coefficients
from ..schedule import FloatArray
from .grids import Grid, ddim_grid
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions


def transition(grid: Grid, std: FloatArray | float = 0.0) -> Calls:
    """x' = A' x_0 + sqrt(S'^2 - std^2) epsilon + std z (eq. 12), with epsilon = (x - A x_0) / S."""
    direction = _direction(grid, std)
    return Calls.one_per_step(
        grid,
        c_x=direction / grid.noise,
        c_0=grid.next_signal - direction * grid.signal / grid.noise,
        s=std,
    )


def calls(grid: Grid, options: SamplerOptions) -> Calls:
    """DDIM with std = eta times the posterior's (eq. 16); eta = 1 is DDPM with small variance.

    With clipping the direction keeps the model's own epsilon from before the clamp, so the row
    reads the model's output directly, unless ``clipped_direction`` derives it from the clipped x_0.
    """
    std = (options.eta or 0.0) * grid.posterior_std
    if options.clip == math.inf or options.clipped_direction:
        return transition(grid, std)
    direction = _direction(grid, std)
    e_x, e_m = epsilon_coefficients(options.prediction_type, grid.signal, grid.noise)
    return Calls.one_per_step(
        grid, c_x=direction * e_x, c_m=direction * e_m, c_0=grid.next_signal, s=std
    )


def _direction(grid: Grid, std: FloatArray | float) -> FloatArray:
    return np.sqrt(np.maximum(grid.next_noise**2 - np.square(std), 0))


OPTIONS = {"eta": 0.0, "clipped_direction": False}

SAMPLERS = (
    Sampler(
        "ddim",
        ddim_grid,
        calls,
        options=OPTIONS,
        diffusers=(DiffusersName("DDIMScheduler"),),
        comfyui="ddim",
    ),
)
