"""All samplers under their names, and the tables that are made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..guidance import plan_guidance
from ..ops import checks
from ..prediction import x0_coefficients
from ..schedule import DiffusionSchedule
from . import (
    cfg_pp,
    compvis,
    consistency,
    ddim,
    ddpm,
    dpm_solver,
    dpm_solver_noise,
    euler,
    extrapolation,
    heun,
    linear_multistep,
    midpoint,
    pndm,
    restart,
    sa_solver,
    singlestep,
    unipc,
)
from .grids import SPACINGS, Grid
from .names import options_of
from .sampler import Calls, Sampler, SamplerOptions
from .schedules import NAMES
from .table import INDEX, StepTable

FAMILIES = (
    *(ddpm, ddim, dpm_solver, euler, heun, unipc, midpoint, singlestep, extrapolation, restart),
    *(cfg_pp, compvis, consistency, dpm_solver_noise, linear_multistep, pndm, sa_solver),
)
SAMPLERS = MappingProxyType({one.name: one for family in FAMILIES for one in family.SAMPLERS})


def find(sampler: str | Sampler) -> Sampler:
    """
    Raises:
        ValueError: a name that no sampler has.
    """
    if isinstance(sampler, Sampler):
        return sampler
    checks.one_of("sampler", sampler, SAMPLERS)
    return SAMPLERS[sampler]


def reads_unconditional(options: SamplerOptions) -> bool:
    """Whether the sampler that the options name reads the unconditional output by itself.

    Raises:
        ValueError: a name that nobody has, or that of a sampler that is no table.
    """
    spacing, convention = options.timestep_spacing, options.convention
    return find(options_of(options.sampler, spacing, SAMPLERS, convention)["sampler"]).unconditional


def of_diffusers(scheduler: str, config: Mapping[str, Any]) -> Sampler | None:
    """The sampler of a scheduler class of diffusers with these settings; None if there is none."""
    for sampler in SAMPLERS.values():
        for name in sampler.diffusers:
            same = all(config.get(key) == value for key, value in name.settings.items())
            if name.scheduler == scheduler and same and not name.nearest:
                return sampler
    return None


def make_table(
    sampler: str, schedule: DiffusionSchedule, steps: int | None = None, **options: Any
) -> StepTable:
    """The table of a sampler on a schedule's time grid.

    Args:
        sampler: one of :data:`SAMPLERS`, or a name of another program (:mod:`.names`).
        schedule: what the model was trained with.
        steps: 1 to T, None for all T.
        options: the other attributes of :class:`SamplerOptions`.

    Raises:
        TypeError: an option that there is not.
        ValueError: unknown names, numbers out of range, timesteps past T - 1, epsilon at zero SNR,
            an option that the sampler doesn't have.
    """
    return table_of(SamplerOptions(sampler=sampler, steps=steps).replace(**options), schedule)


def table_of(options: SamplerOptions, schedule: DiffusionSchedule) -> StepTable:
    """The same for options in one value."""
    if not isinstance(options.sampler, str):
        checks.fail("sampler", "a name", repr(options.sampler))
    spacing, convention = options.timestep_spacing, options.convention
    if convention == "diffusers":
        checks.one_of("timestep_spacing", spacing, dict.fromkeys((*SPACINGS, *NAMES)))
    options = options.replace(**options_of(options.sampler, spacing, SAMPLERS, convention))
    sampler = find(options.sampler)
    options.check()
    steps = options.steps_of(schedule.timesteps)
    options = dataclasses.replace(sampler.resolved(options), steps=steps)
    grid = sampler.place(schedule, steps, options)
    if options.strength is not None:  # an image comes with its noise
        skipped = len(grid) - options.steps_to_run(len(grid))
        later = tuple(i - skipped for i in options.disable_corrector or () if i >= skipped)
        grid, options = grid.part(skipped), options.replace(disable_corrector=later)
    start, end = options.hand_over(schedule.timesteps)
    if skipped := int((grid.timesteps >= start).sum()):
        later = tuple(i - skipped for i in options.disable_corrector or () if i >= skipped)
        grid, options = grid.part(skipped), options.replace(disable_corrector=later)
    run = int((grid.timesteps >= end).sum())
    if not run:
        asked = f"{options.denoising_start} to {options.denoising_end} of {steps} steps"
        checks.fail("denoising_start, denoising_end", "parts with a step between them", asked)
    # Solver grids put a small SNR in the place of zero, where epsilon says nothing all the same.
    if (
        options.prediction_type == "epsilon"
        and not schedule.alpha_bar[math.ceil(grid.timesteps[0])]
    ):
        x0_coefficients("epsilon", np.zeros(1), np.ones(1))
    return _table(sampler, grid, options, run)


def table_from_grid(sampler: str | Sampler, grid: Grid, **options: Any) -> StepTable:
    """The table of a sampler on a grid of one's own.

    Args:
        sampler: one of :data:`SAMPLERS`, or an entry of one's own.
        grid: the steps, all of which run.
        options: those attributes of :class:`SamplerOptions` that choose no grid. Without
            ``steps``, a number of steps, the solvers keep their order to the end.

    Raises:
        TypeError, ValueError: as :func:`make_table`.
    """
    entry = find(sampler)
    chosen = SamplerOptions(sampler=entry.name).replace(**options)
    chosen.check()
    return _table(entry, grid, entry.resolved(chosen))


def _table(
    sampler: Sampler, grid: Grid, options: SamplerOptions, run: int | None = None
) -> StepTable:
    """The table of a grid, or of its first ``run`` steps."""
    clip, calls = options.clip, sampler.calls(grid, options)
    ends = run is None or run == len(grid)
    calls = calls if ends or run is None else calls.first(run)
    starts = np.flatnonzero(np.diff(calls.step, prepend=-1))
    with np.errstate(divide="ignore"):
        sigma = calls.noise[starts] / calls.signal[starts]
    scale = options.guidance_scale
    if sampler.guidance_divisor != 1:
        scale = (np.asarray(scale, np.float64) / sampler.guidance_divisor).tolist()
    guidance = plan_guidance(sigma, scale, options.guidance_interval, options.guidance_rescale)
    a, b = x0_coefficients(options.prediction_type, calls.signal, calls.noise)
    rows = calls.coefficients
    for name, values in (
        ("a", a),
        ("b", b),
        ("clip", clip),
        ("guidance", guidance.scale[calls.step]),
        ("rescale", guidance.rescale[calls.step]),
    ):
        rows[:, INDEX[name]] = values
    draws = rows[:, INDEX["s"]] != 0 if calls.draws is None else calls.draws
    return StepTable(
        sampler=sampler.name,
        rows=torch.from_numpy(rows),
        timesteps=torch.from_numpy(calls.timesteps),
        step_of_row=torch.from_numpy(calls.step),
        initial_scale=_churned(grid.initial_scale, grid, calls),
        signal=float(calls.signal[0]),
        noise=_churned(float(grid.noise[0]), grid, calls),
        halves="both" if sampler.unconditional else guidance.halves,
        levels=torch.from_numpy(np.stack((calls.signal, calls.noise), axis=1)),
        next_levels=torch.from_numpy(np.stack((calls.next_signal, calls.next_noise), axis=1)),
        draws=torch.from_numpy(draws),
        ends=ends,
    )


def _churned(std: float, grid: Grid, calls: Calls) -> float:
    """A standard deviation of the state where the grid begins, after the first step's churn."""
    if not calls.churn:
        return std
    return float(calls.signal[0]) * math.hypot(std / float(grid.signal[0]), calls.churn)
