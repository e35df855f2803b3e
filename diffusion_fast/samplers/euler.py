"""Euler and Euler-ancestral (Karras et al. 2022, arXiv:2206.00364; Crowson's k-diffusion).

Their state x_0 + sigma epsilon, divided by sqrt(1 + sigma^2), is the variance-preserving form, and
in it a Euler step to sigma' is the step of DDIM, an ancestral one that of its posterior.
"""

from __future__ import annotations

from .ddim import transition
from .grids import Grid, sigma_grid
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions


def euler(grid: Grid, options: SamplerOptions) -> Calls:
    """x' = x + (sigma' - sigma) dx/dsigma, dx/dsigma = (x - x_0) / sigma."""
    return transition(grid)


def ancestral(grid: Grid, options: SamplerOptions) -> Calls:
    """Euler to sigma_down = sigma'^2 / sigma, then noise of sqrt(sigma'^2 - sigma_down^2)."""
    return transition(grid, grid.posterior_std)


SAMPLERS = (
    Sampler("euler", sigma_grid, euler, diffusers=(DiffusersName("EulerDiscreteScheduler"),)),
    Sampler(
        "euler_ancestral",
        sigma_grid,
        ancestral,
        diffusers=(DiffusersName("EulerAncestralDiscreteScheduler"),),
    ),
)
