"""Heun's method of second order (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

from __future__ import annotations

import numpy as np

from ..prediction import epsilon_coefficients
from ..schedule import FloatArray
from .ddim import transition_rows
from .grids import Grid
from .table import INDEX, rows_of


def heun_points(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For 2 steps - 1 rows: the grid point where the model is called, and the step."""
    row = np.arange(2 * steps - 1)
    return (row + 1) // 2, row // 2


def heun_rows(grid: Grid, prediction_type: str, clipped: bool) -> FloatArray:
    """Two rows per step; the last step, mostly to sigma = 0, is a single Euler row.

    With x_0 + sigma epsilon as the state, epsilon is its slope in sigma. The first row is Euler's
    and keeps y = epsilon; the second, at its result, replaces that slope by the mean of both:

        x' = x_euler + (sigma' - sigma) / 2 (epsilon' - epsilon)

    epsilon' comes straight from the model's output, or from the clamped x_0 if there is clipping:
    by way of x_0 all digits would cancel where sigma is large.
    """
    n = len(grid) - 1
    first = transition_rows(grid)
    first[:n, INDEX["d_x"]] = 1 / grid.noise[:n]
    first[:n, INDEX["d_0"]] = -grid.signal[:n] / grid.noise[:n]

    signal, noise = grid.next_signal[:n], grid.next_noise[:n]
    weight = 0.5 * (noise - signal * grid.sigma[:n])  # in the variance-preserving form
    if clipped:
        second = rows_of(n, c_y=-weight, c_x=1 + weight / noise, c_0=-weight * signal / noise)
    else:
        e_x, e_m = epsilon_coefficients(prediction_type, signal, noise)
        second = rows_of(n, c_y=-weight, c_x=1 + weight * e_x, c_m=weight * e_m)

    rows = rows_of(2 * n + 1)
    rows[0::2], rows[1::2] = first, second
    return rows
