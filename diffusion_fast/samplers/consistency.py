"""Consistency models: LCM (Luo et al. 2023, arXiv:2310.04378) and TCD (Zheng et al. 2024,
arXiv:2402.19159), as diffusers samples them."""

from __future__ import annotations

import numpy as np

from ..ops import checks
from ..prediction import epsilon_coefficients
from ..schedule import DiffusionSchedule
from .grids import Grid, GridOptions, given
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions

TRAINED_STEPS = 50  # of the schedule that such models are distilled on
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


def distilled_grid(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    """n of the 50 timesteps of distillation, evenly spaced from the last; each goes to the next."""
    known = given(schedule, steps, options, whole=True)
    if known is not None:
        return known
    count = schedule.timesteps
    trained = min(TRAINED_STEPS, count)
    if steps > trained:
        checks.fail("steps", f"at most {trained} for a consistency model", steps)
    origin = (np.arange(trained, 0, -1) * (count // trained)) - 1
    t = origin[np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(np.int64)]
    return Grid.from_alpha_bars(np.append(schedule.alpha_bar[t], 1.0), t)


def lcm(grid: Grid, options: SamplerOptions) -> Calls:
    """x' = A' f + S' z with f = c_skip x + c_out x_0, the boundary conditions' mixture.

    c_skip = d^2 / (s^2 + d^2) and c_out = s / sqrt(s^2 + d^2) with s = 10 t and d = 0.5 (the
    paper's appendix C). The last step ends at f.
    """
    scaled = TIMESTEP_SCALING * grid.timesteps
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    signal, noise = grid.next_signal.copy(), grid.next_noise.copy()
    signal[-1], noise[-1] = 1.0, 0.0
    return Calls.one_per_step(
        grid, c_x=signal * skip, c_0=signal * out, s=noise * (options.s_noise or 0.0)
    )


def tcd(grid: Grid, options: SamplerOptions) -> Calls:
    """To level s = floor((1 - eta) t') along epsilon, then noise up to t' (eq. 16).

    The last step goes to the level of t = 0 and adds no noise.
    """
    if grid.levels is None:
        checks.fail("grid", "one of a schedule, for TCD", "noise levels alone")
    after = np.append(grid.timesteps[1:], 0.0)
    between = np.floor((1 - (options.eta or 0.0)) * after).astype(np.int64)
    signal = 1 / np.sqrt(1 + np.square(grid.levels[between]))
    noise = np.sqrt(1 - signal**2)
    end = np.append(grid.signal[1:], signal[-1])
    ratio = end / signal
    e_x, e_m = epsilon_coefficients(options.prediction_type, grid.signal, grid.noise)
    std = np.sqrt(np.maximum(1 - ratio**2, 0))
    made = Calls.one_per_step(
        grid,
        c_x=ratio * noise * e_x,
        c_m=ratio * noise * e_m,
        c_0=end,
        s=std,
    )
    made.next_signal[-1], made.next_noise[-1] = end[-1], np.sqrt(1 - end[-1] ** 2)
    return made


SAMPLERS = (
    Sampler(
        "lcm",
        distilled_grid,
        lcm,
        options={"s_noise": 1.0},
        diffusers=(DiffusersName("LCMScheduler"),),
    ),
    Sampler(
        "tcd",
        distilled_grid,
        tcd,
        options={"eta": 0.3},
        diffusers=(DiffusersName("TCDScheduler"),),
    ),
)
