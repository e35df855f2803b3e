"""DDIM (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import numpy as np

from ..prediction import epsilon_coefficients
from ..schedule import FloatArray
from .grids import Grid
from .table import rows_of


def transition_rows(grid: Grid, std: FloatArray | float = 0.0) -> FloatArray:
    """x' = A' x_0 + sqrt(S'^2 - std^2) epsilon + std z (eq. 12), with epsilon = (x - A x_0) / S."""
    direction = _direction(grid, std)
    return rows_of(
        len(grid),
        c_x=direction / grid.noise,
        c_0=grid.next_signal - direction * grid.signal / grid.noise,
        s=std,
    )


def ddim_rows(grid: Grid, eta: float, prediction_type: str, clipped: bool) -> FloatArray:
    """DDIM with std = eta times the posterior's (eq. 16); eta = 1 is DDPM with small variance.

    With clipping the direction keeps the model's own epsilon from before the clamp, so the row
    reads the model's output directly.
    """
    std = eta * grid.posterior_std
    if not clipped:
        return transition_rows(grid, std)
    direction = _direction(grid, std)
    e_x, e_m = epsilon_coefficients(prediction_type, grid.signal, grid.noise)
    return rows_of(len(grid), c_x=direction * e_x, c_m=direction * e_m, c_0=grid.next_signal, s=std)


def _direction(grid: Grid, std: FloatArray | float) -> FloatArray:
    return np.sqrt(np.maximum(grid.next_noise**2 - np.square(std), 0))
