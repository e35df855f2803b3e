"""Ancestral sampling of DDPM (Ho et al. 2020, arXiv:2006.11239, algorithm 2)."""

from __future__ import annotations

import numpy as np

from ..ops import checks
from ..schedule import FloatArray
from .ddim import transition_rows
from .grids import Grid
from .table import INDEX

VARIANCES = ("large", "small")


def ddpm_rows(grid: Grid, variance: str) -> FloatArray:
    """x' = mean of q(x' | x, x_0) + s z (eq. 7), with s^2 one of section 3.2's two choices.

    ``"large"``: beta = 1 - abar / abar', as in the paper's code; ``"small"``: the posterior's own
    variance, at least 1e-20. Noise is drawn where t > 0 and not at t = 0. A grid that ends above
    t = 0 (trailing, or an offset) therefore adds noise on its last row too, with large variance
    visibly, as diffusers does.
    """
    checks.one_of("variance", variance, VARIANCES)
    rows = transition_rows(grid, grid.posterior_std)
    if variance == "large":
        std = np.sqrt(np.maximum(1 - np.square(grid.signal / grid.next_signal), 0))
    else:
        std = np.maximum(grid.posterior_std, 1e-10)
    rows[:, INDEX["s"]] = np.where(grid.timesteps > 0, std, 0)
    return rows
