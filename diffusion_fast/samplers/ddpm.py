"""Ancestral sampling of DDPM (Ho et al. 2020, arXiv:2006.11239, algorithm 2)."""

from __future__ import annotations

import numpy as np

from .ddim import transition
from .grids import Grid, ddpm_grid
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions
from .table import INDEX


def calls(grid: Grid, options: SamplerOptions) -> Calls:
    """x' = mean of q(x' | x, x_0) + s z (eq. 7), with s^2 one of section 3.2's two choices.

    ``"large"``: beta = 1 - abar / abar', as in the paper's code; ``"small"``: the posterior's own
    variance, at least 1e-20. Noise is drawn where t > 0 and not at t = 0. A grid that ends above
    t = 0 (trailing, or an offset) therefore adds noise on its last row too, with large variance
    visibly, as diffusers does.
    """
    made = transition(grid, grid.posterior_std)
    if options.variance == "large":
        std = np.sqrt(np.maximum(1 - np.square(grid.signal / grid.next_signal), 0))
    else:
        std = np.maximum(grid.posterior_std, 1e-10)
    made.coefficients[:, INDEX["s"]] = np.where(grid.timesteps > 0, std, 0)
    return made


SAMPLERS = (
    Sampler(
        "ddpm",
        ddpm_grid,
        calls,
        options={"variance": "large"},
        diffusers=(DiffusersName("DDPMScheduler"),),
    ),
)
