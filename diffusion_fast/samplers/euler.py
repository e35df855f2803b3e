"""Euler and Euler-ancestral (Karras et al. 2022, arXiv:2206.00364; Crowson's k-diffusion).

Their state x_0 + sigma epsilon, divided by sqrt(1 + sigma^2), is the variance-preserving form, and
in it a Euler step to sigma' is the step of DDIM, an ancestral one that of its posterior.
"""

from __future__ import annotations

from ..schedule import FloatArray
from .ddim import transition_rows
from .grids import Grid


def euler_rows(grid: Grid) -> FloatArray:
    """x' = x + (sigma' - sigma) dx/dsigma, dx/dsigma = (x - x_0) / sigma."""
    return transition_rows(grid)


def euler_ancestral_rows(grid: Grid) -> FloatArray:
    """Euler to sigma_down = sigma'^2 / sigma, then noise of sqrt(sigma'^2 - sigma_down^2)."""
    return transition_rows(grid, grid.posterior_std)
