"""Euler and Euler-ancestral (Karras et al. 2022, arXiv:2206.00364; Crowson's k-diffusion).

Their state x_0 + sigma epsilon, divided by sqrt(1 + sigma^2), is the variance-preserving form, and
in it a Euler step to sigma' is the step of DDIM, an ancestral one that of its posterior.
"""

from __future__ import annotations

from .ddim import transition
from .grids import Grid, sigma_grid
from .program import EPS, Program, X
from .sampler import CHURN, Calls, DiffusersName, Sampler, SamplerOptions
from .table import INDEX


def euler(grid: Grid, options: SamplerOptions) -> Calls:
    """x' = x + (sigma' - sigma) dx/dsigma, dx/dsigma = (x - x_0) / sigma."""
    if not options.s_churn:
        return transition(grid)
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        level, noise = program.raised(i)
        program.call(i, sigma, level, X + (after - sigma) * EPS + noise)
    return program.calls()


def ancestral(grid: Grid, options: SamplerOptions) -> Calls:
    """Euler to a lower level than sigma', then noise up to it: eta times the posterior's."""
    made = transition(grid, (options.eta or 0.0) * grid.posterior_std)
    made.coefficients[:, INDEX["s"]] *= options.s_noise or 0.0
    return made


SAMPLERS = (
    Sampler(
        "euler",
        sigma_grid,
        euler,
        options=CHURN,
        diffusers=(DiffusersName("EulerDiscreteScheduler"),),
        comfyui="euler",
        a1111="Euler",
        k_diffusion=True,
    ),
    Sampler(
        "euler_ancestral",
        sigma_grid,
        ancestral,
        options={"eta": 1.0, "s_noise": 1.0},
        diffusers=(DiffusersName("EulerAncestralDiscreteScheduler"),),
        comfyui="euler_ancestral",
        a1111="Euler a",
        k_diffusion=True,
    ),
)
