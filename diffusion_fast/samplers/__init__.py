"""Samplers as tables of coefficients; :func:`make_table` builds any of them.

A sampler is layered: a :class:`~.grids.Grid` of noise levels, a function from the grid to rows, and
this file, which adds what all share: prediction type, clipping, guidance, image-to-image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..guidance import plan_guidance
from ..ops import checks
from ..prediction import x0_coefficients
from ..schedule import DiffusionSchedule, FloatArray
from . import grids
from .ddim import ddim_rows
from .ddpm import VARIANCES, ddpm_rows
from .dpm_solver import dpm_solver_rows
from .euler import euler_ancestral_rows, euler_rows
from .grids import Grid
from .heun import heun_points, heun_rows
from .table import INDEX, StepTable
from .unipc import unipc_rows

__all__ = ["SAMPLERS", "Grid", "StepTable", "make_table", "table_from_grid"]

_GRIDS: dict[str, Callable[[DiffusionSchedule, int, str, int, str], Grid]] = {
    "ddpm": grids.ddpm_grid,
    "ddim": grids.ddim_grid,
    "dpmpp_1": grids.solver_grid,
    "dpmpp_2m": grids.solver_grid,
    "dpmpp_3m": grids.solver_grid,
    "dpmpp_3m_diffusers": grids.solver_grid,
    "dpmpp_2m_sde": grids.solver_grid,
    "euler": grids.sigma_grid,
    "euler_ancestral": grids.sigma_grid,
    "heun": grids.sigma_grid,
    "unipc": grids.solver_grid,
    "unipc_3": grids.solver_grid,
}
SAMPLERS = tuple(_GRIDS)


def make_table(
    sampler: str,
    schedule: DiffusionSchedule,
    steps: int | None = None,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    final_alpha: str = "one",
    prediction_type: str = "epsilon",
    variance: str = "large",
    eta: float = 0.0,
    clip_sample: bool | float = False,
    strength: float | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
) -> StepTable:
    """The table of a sampler on a schedule's time grid.

    Args:
        sampler: one of :data:`SAMPLERS`. ``dpmpp_3m_diffusers`` is third order as diffusers writes
            it, which converges with order 2; ``unipc`` is of order 2 with its corrector.
        steps: 1 to T, None for all T. Heun calls the model 2 steps - 1 times.
        timestep_spacing: ``"leading"``, ``"trailing"``, ``"linspace"`` or ``"karras"``; see
            :mod:`.grids` for what each means and where it differs from diffusers.
        steps_offset: added to every timestep of leading spacing.
        final_alpha: alpha-bar after the last step: ``"one"`` (no noise) or ``"first"``, that of
            t = 0 (``set_alpha_to_one=False`` and ``final_sigmas_type="sigma_min"`` in diffusers).
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        variance: of DDPM, ``"large"`` or ``"small"``.
        eta: of DDIM, in [0, 1]; 0 is deterministic.
        clip_sample: clamp x_0 to [-1, 1] (True) or to [-c, c] (a number c > 0).
        strength: image-to-image, in (0, 1]: run only the last ``int(steps * strength)`` steps,
            starting from ``signal * image + noise * z``.
        guidance_scale, guidance_interval, guidance_rescale: see
            :func:`~diffusion_fast.guidance.plan_guidance`; the steps are those that run.

    Raises:
        ValueError: unknown names, numbers out of range, timesteps past T - 1, epsilon at zero SNR.
    """
    checks.one_of("sampler", sampler, SAMPLERS)
    checks.one_of("variance", variance, VARIANCES)
    checks.one_of("timestep_spacing", timestep_spacing, grids.SPACINGS)
    checks.one_of("final_alpha", final_alpha, grids.FINAL_ALPHAS)
    count = schedule.timesteps
    steps = count if steps is None else steps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= count:
        checks.fail("steps", f"an integer in [1, {count}]", repr(steps))
    if not isinstance(steps_offset, int) or isinstance(steps_offset, bool) or steps_offset < 0:
        checks.fail("steps_offset", "an integer >= 0", repr(steps_offset))

    grid = _GRIDS[sampler](schedule, steps, timestep_spacing, steps_offset, final_alpha)
    grid = grid.tail(steps - _steps_to_run(steps, strength))
    # Solver grids put a small SNR in the place of zero, where epsilon says nothing all the same.
    if prediction_type == "epsilon" and not schedule.alpha_bar[math.ceil(grid.timesteps[0])]:
        x0_coefficients(prediction_type, np.zeros(1), np.ones(1))
    starts_at_noise = strength is None and timestep_spacing != "leading"
    return table_from_grid(
        sampler,
        grid,
        prediction_type=prediction_type,
        variance=variance,
        eta=eta,
        clip_sample=clip_sample,
        # Euler and Heun of diffusers start from sigma z but for leading spacing, that is from S z.
        initial_scale=float(grid.noise[0])
        if starts_at_noise and _GRIDS[sampler] is grids.sigma_grid
        else 1.0,
        lower_order_final=steps < 15,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
    )


def table_from_grid(
    sampler: str,
    grid: Grid,
    *,
    prediction_type: str = "epsilon",
    variance: str = "large",
    eta: float = 0.0,
    clip_sample: bool | float = False,
    initial_scale: float = 1.0,
    lower_order_final: bool = False,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
) -> StepTable:
    """The table of a sampler on a grid of one's own; arguments and errors as in :func:`make_table`.

    ``lower_order_final``: let DPM-Solver++ end with orders 2 and 1.
    """
    checks.one_of("sampler", sampler, SAMPLERS)
    checks.finite("eta", eta)
    if not 0 <= eta <= 1:
        checks.fail("eta", "a number in [0, 1]", eta)
    if eta and sampler != "ddim":
        checks.fail("eta", f"0 for {sampler} (only ddim has it)", eta)
    clip = _clip(clip_sample)

    rows = _rows(
        sampler, grid, prediction_type, variance, eta, math.isfinite(clip), lower_order_final
    )
    point = step = np.arange(len(grid))
    if sampler == "heun":
        point, step = heun_points(len(grid))
    a, b = x0_coefficients(prediction_type, grid.signal, grid.noise)
    guidance = plan_guidance(grid.sigma, guidance_scale, guidance_interval, guidance_rescale)
    for name, values in (
        ("a", a[point]),
        ("b", b[point]),
        ("clip", clip),
        ("guidance", guidance.scale[step]),
        ("rescale", guidance.rescale[step]),
    ):
        rows[:, INDEX[name]] = values
    return StepTable(
        sampler=sampler,
        rows=torch.from_numpy(rows),
        timesteps=torch.from_numpy(grid.timesteps[point]),
        step_of_row=torch.from_numpy(step),
        initial_scale=initial_scale,
        signal=float(grid.signal[0]),
        noise=float(grid.noise[0]),
        halves=guidance.halves,
        next_levels=torch.from_numpy(
            np.stack((grid.next_signal[step], grid.next_noise[step]), axis=1)
        ),
    )


def _rows(
    sampler: str,
    grid: Grid,
    prediction_type: str,
    variance: str,
    eta: float,
    clipped: bool,
    lower_order_final: bool,
) -> FloatArray:
    match sampler:
        case "ddpm":
            return ddpm_rows(grid, variance)
        case "ddim":
            return ddim_rows(grid, eta, prediction_type, clipped)
        case "euler":
            return euler_rows(grid)
        case "euler_ancestral":
            return euler_ancestral_rows(grid)
        case "heun":
            return heun_rows(grid, prediction_type, clipped)
        case "unipc" | "unipc_3":
            return unipc_rows(grid, order=3 if sampler == "unipc_3" else 2)
    return dpm_solver_rows(
        grid,
        order={"dpmpp_1": 1, "dpmpp_2m": 2, "dpmpp_2m_sde": 2}.get(sampler, 3),
        sde=sampler == "dpmpp_2m_sde",
        lower_order_final=lower_order_final,
        halved_curvature=sampler == "dpmpp_3m_diffusers",
    )


def _clip(clip_sample: bool | float) -> float:
    if isinstance(clip_sample, bool):
        return 1.0 if clip_sample else math.inf
    checks.finite("clip_sample", clip_sample)
    if clip_sample <= 0:
        checks.fail("clip_sample", "False, True or a number > 0", clip_sample)
    return float(clip_sample)


def _steps_to_run(steps: int, strength: float | None) -> int:
    if strength is None:
        return steps
    checks.finite("strength", strength)
    if not 0 < strength <= 1:
        checks.fail("strength", "a number in (0, 1]", strength)
    run = min(int(steps * strength), steps)
    if run < 1:
        checks.fail("strength", f"at least 1 / steps = {1 / steps:.3g}", strength)
    return run
