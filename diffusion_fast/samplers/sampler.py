"""What a sampler is: a time grid, and the coefficients of each model call on it.

The families' files make :class:`Sampler` entries; :mod:`.registry` gathers them under their names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ops import checks
from ..prediction import PREDICTION_TYPES
from ..schedule import DiffusionSchedule, FloatArray
from .grids import Grid, GridOptions, schedule_levels, sigma_grid
from .schedules import CONVENTIONS, schedule_grid
from .table import coefficients


@dataclass(frozen=True)
class SamplerOptions(GridOptions):
    """How to sample: everything about a run but the model, the schedule and the noise.

    Attributes of :class:`~.grids.GridOptions`, and:
        sampler: one of :data:`~diffusion_fast.samplers.SAMPLERS`. ``dpmpp_3m_diffusers`` is third
            order as diffusers writes it, which converges with order 2; ``unipc`` is of order 2 with
            its corrector.
        steps: 1 to T, None for all T. Heun calls the model 2 steps - 1 times.
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        variance: noise of DDPM's steps, ``"large"`` or ``"small"``; None for large. Others have
            no use for it.
        eta: in [0, 1], the noise of a step as a part of the posterior's; 0 is deterministic, and
            None is 0 for DDIM, 0.3 for TCD and 1 for the others that have it.
        order: 1 to 4, at how many calls a linear multistep sampler looks; None for 4, and 3 for
            DEIS.
        predictor_order, corrector_order: 1 to 4, those of SA-Solver; None for 3 and 4, and 2 and 2
            as diffusers has it.
        s_noise: a factor of the noise that a step adds; None for 1.
        s_churn, s_tmin, s_tmax: noise to add before each of n steps from a noise level in [s_tmin,
            s_tmax], as a factor 1 + s_churn / n of the level, at most sqrt(2) (Karras et al. 2022,
            algorithm 2). The first step's is part of the noise that a run starts from.
        clip_sample: clamp x_0 to [-1, 1] (True) or to [-c, c] (a number c > 0).
        clipped_direction: whether the epsilon of DDIM's direction follows from the clipped x_0
            (``use_clipped_model_output``); None for False.
        lower_order_final: end a multistep solver with steps of lower order, DPM-Solver++ only where
            a schedule's grid has fewer than 15 steps; None for True.
        euler_at_final: let DPM-Solver++ end with a step of first order, as it does to no noise.
        disable_corrector: steps of UniPC whose result is not corrected, counted from 0.
        strength: image-to-image, in (0, 1]: run only the last ``int(steps * strength)`` steps,
            starting from ``signal * image + noise * z``.
        denoising_start, denoising_end: in (0, 1), parts of the schedule's timesteps: run only the
            steps that begin below, or not below, the one that is left of all T behind that part.
            So two models share one picture, as SDXL's base and refiner do: the first ends where the
            second starts, with a state that still holds its noise.
        guidance_scale, guidance_interval, guidance_rescale: see
            :func:`~diffusion_fast.guidance.plan_guidance`; the steps are those that run.
    """

    sampler: str = "ddpm"
    steps: int | None = None
    prediction_type: str = "epsilon"
    variance: str | None = None
    eta: float | None = None
    s_noise: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    order: int | None = None
    predictor_order: int | None = None
    corrector_order: int | None = None
    clip_sample: bool | float = False
    clipped_direction: bool | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool | None = None
    disable_corrector: Sequence[int] | None = None
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    guidance_scale: float | Sequence[float] = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0

    def replace(self, **changes: Any) -> SamplerOptions:
        """The same with some options changed.

        Raises:
            TypeError: a name that is none of the options.
        """
        names = [one.name for one in dataclasses.fields(self)]
        unknown = sorted(changes.keys() - set(names))
        if unknown:
            known = ", ".join(sorted(names))
            raise TypeError(f"{unknown[0]}: expected one of the keywords {known}")
        return dataclasses.replace(self, **changes)

    @property
    def clip(self) -> float:
        """The limit of ``|x_0|``, infinite for none."""
        if isinstance(self.clip_sample, bool):
            return 1.0 if self.clip_sample else np.inf
        checks.finite("clip_sample", self.clip_sample)
        if self.clip_sample <= 0:
            checks.fail("clip_sample", "False, True or a number > 0", self.clip_sample)
        return float(self.clip_sample)

    def steps_of(self, count: int) -> int:
        """The number of steps on a schedule of ``count`` timesteps."""
        own = self.count
        if own is not None:
            if self.steps not in (None, own):
                checks.fail("steps", f"None or {own} for a grid of one's own", self.steps)
            return own
        return count if self.steps is None else checks.whole_between("steps", self.steps, 1, count)

    def steps_to_run(self, steps: int) -> int:
        """How many of the last of ``steps`` steps run."""
        if self.strength is None:
            return steps
        checks.finite("strength", self.strength)
        if not 0 < self.strength <= 1:
            checks.fail("strength", "a number in (0, 1]", self.strength)
        run = min(int(steps * self.strength), steps)
        if run < 1:
            checks.fail("strength", f"at least 1 / steps = {1 / steps:.3g}", self.strength)
        return run

    def hand_over(self, count: int) -> tuple[float, float]:
        """The timesteps, of ``count``, below which steps begin, and not below which they do.

        Raises:
            ValueError: parts that are none, or that leave nothing between them.
        """
        found = []
        for name in ("denoising_start", "denoising_end"):
            part = getattr(self, name)
            if part is None:
                found.append(math.inf if name == "denoising_start" else -math.inf)
                continue
            checks.finite(name, part)
            if not 0 < part < 1:
                checks.fail(name, "a number in (0, 1)", part)
            found.append(round(count - part * count))
        start, end = found
        if start <= end:
            expected = f"less than denoising_end ({self.denoising_end:g})"
            checks.fail("denoising_start", expected, self.denoising_start)
        if self.denoising_start is not None and self.strength is not None:
            checks.fail("strength", "None beside denoising_start", self.strength)
        return start, end

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no sampler takes.
        """
        checks.one_of("convention", self.convention, CONVENTIONS)
        super().check()
        checks.one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)


@dataclass(frozen=True)
class Calls:
    """The model calls of a sampler on a grid, in their order.

    Attributes:
        coefficients: float64 [N, len(COLUMNS)]. Prediction, clipping and guidance come later.
        step: the step that each call belongs to, int64 [N].
        timesteps: t of each call, float64 [N].
        signal, noise: A and S of the state that each call sees, [N].
        next_signal, next_noise: A and S of the state after each call, [N].
        draws: whether a call takes noise from the generator, bool [N]; None where those do that
            read it.
        churn: the standard deviation of noise that the first call's level has beside the grid's.
    """

    coefficients: FloatArray
    step: np.ndarray
    timesteps: FloatArray
    signal: FloatArray
    noise: FloatArray
    next_signal: FloatArray
    next_noise: FloatArray
    draws: np.ndarray | None = None
    churn: float = 0.0

    def first(self, steps: int) -> Calls:
        """Those of the first so many steps."""
        count = int((self.step < steps).sum())
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        cut: dict[str, Any] = {k: v[:count] for k, v in values.items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **cut)

    @classmethod
    def one_per_step(cls, grid: Grid, **columns: float | FloatArray) -> Calls:
        """A call for each step of the grid, with the named columns of the table set."""
        return cls(
            coefficients(len(grid), **columns),
            np.arange(len(grid)),
            grid.timesteps,
            grid.signal,
            grid.noise,
            grid.next_signal,
            grid.next_noise,
        )


CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
GridOf = Callable[[DiffusionSchedule, int, SamplerOptions], Grid]


@dataclass(frozen=True)
class DiffusersName:
    """A scheduler class of diffusers, and the settings of its that mean this sampler.

    ``nearest``: they mean another sampler, the nearest to this one that diffusers has.
    """

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    nearest: bool = False


@dataclass(frozen=True)
class Sampler:
    """An entry of the registry.

    Attributes:
        name: its name here.
        grid: the time grid of a schedule, a number of steps and options.
        calls: the model calls on a grid.
        calls_per_step: how many calls a step has; the last step may have one.
        options: those options that not every sampler has, with their defaults.
        diffusers: its names in diffusers.
        comfyui, a1111: its names in ComfyUI and AUTOMATIC1111.
        k_diffusion: whether k-diffusion has it too, under ComfyUI's name after "sample_".
        unconditional: whether its rows read the unconditional output by itself, so that both
            halves of guidance run at any scale.
        guidance_divisor: what the guidance scale is divided by.
        drops_penultimate: whether those two leave out the last noise level above 0.
        own_grid: whether no schedule but its own fits.
    """

    name: str
    grid: GridOf
    calls: Callable[[Grid, SamplerOptions], Calls]
    calls_per_step: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    diffusers: tuple[DiffusersName, ...] = ()
    comfyui: str | None = None
    a1111: str | None = None
    k_diffusion: bool = False
    unconditional: bool = False
    guidance_divisor: float = 1.0
    drops_penultimate: bool = False
    own_grid: bool = False

    def place(self, schedule: DiffusionSchedule, steps: int, options: SamplerOptions) -> Grid:
        """The steps on a schedule."""
        if self.own_grid and options.convention != "diffusers":
            expected = f"'diffusers' for {self.name}, whose grid is its own"
            checks.fail("convention", expected, repr(options.convention))
        if self.own_grid and options.timestep_spacing not in ("leading", "trailing", "linspace"):
            expected = f"none for {self.name}, whose grid is its own"
            checks.fail("timestep_spacing", expected, options.timestep_spacing)
        if options.convention == "diffusers":
            grid = self.grid(schedule, steps, options)
            whole = self.grid is not sigma_grid
        else:
            drops, whole = self.drops_penultimate, options.convention == "comfyui"
            grid = schedule_grid(schedule, steps, options, drops_penultimate=drops)
        return dataclasses.replace(grid, levels=schedule_levels(schedule), whole=whole)

    def resolved(self, options: SamplerOptions) -> SamplerOptions:
        """The options with this sampler's defaults in the place of None.

        Raises:
            ValueError: an option that this sampler doesn't have.
        """
        for name, check in SPECIFIC.items():
            value = getattr(options, name)
            if value is None:
                continue
            check(name, value)
            if name not in (*self.options, "variance") and value not in (
                False,
                0,
                (),
                OFF.get(name),
            ):
                checks.fail(name, f"none for {self.name}, which has no such option", value)
        defaults = dict(self.options)
        if "lower_order_final" in defaults:  # only diffusers ends so
            defaults["lower_order_final"] = options.convention == "diffusers"
        chosen = {k: value for k, value in defaults.items() if getattr(options, k) is None}
        return dataclasses.replace(options, **chosen)


def _eta(name: str, value: Any) -> None:
    checks.finite(name, value)
    if not 0 <= value <= 1:
        checks.fail(name, "a number in [0, 1]", value)


def _variance(name: str, value: Any) -> None:
    checks.one_of(name, value, ("large", "small"))


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        checks.fail(name, "True or False", repr(value))


def _indices(name: str, value: Any) -> None:
    for step in value:
        checks.whole_between(name, step, 0)


def _level(name: str, value: Any) -> None:
    if not value >= 0:
        checks.fail(name, "a number >= 0, or infinity", value)


def _order(name: str, value: Any) -> None:
    checks.whole_between(name, value, 1, 4)


OFF = {"s_noise": 1, "s_tmax": math.inf}  # values that ask for nothing, beside False, 0 and none
# The options that not every sampler has, and the checks of their values.
SPECIFIC: dict[str, Callable[[str, Any], object]] = {
    "eta": _eta,
    "s_noise": checks.not_negative,
    "s_churn": checks.not_negative,
    "s_tmin": checks.not_negative,
    "s_tmax": _level,
    "order": _order,
    "predictor_order": _order,
    "corrector_order": _order,
    "variance": _variance,
    "clipped_direction": _flag,
    "lower_order_final": _flag,
    "euler_at_final": _flag,
    "disable_corrector": _indices,
}
