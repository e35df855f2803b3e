"""What all our schedulers for diffusers share: a table of rows, and a counter of steps on the host.

Configuration, defaults and names come from the diffusers scheduler that each one is derived from;
timesteps, steps and noise levels from :mod:`diffusion_fast.samplers`. Where diffusers keeps
x_0 + sigma epsilon (Euler, Heun), so do these, and so its pipelines and callbacks find what they
expect; :func:`in_sigma_form` rewrites the rows for it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops import checks, sampler_step
from ...samplers import Sampler, SamplerOptions, StepTable, of_diffusers, table_from_grid
from ...samplers.grids import FINAL_ALPHAS, Grid
from ...samplers.table import INDEX
from ...schedule import DiffusionSchedule, FloatArray

Supported = dict[str, tuple[Any, ...]]
Generators = torch.Generator | list[torch.Generator] | None
Rows = tuple[StepTable, list[list[float]]]
Device = str | torch.device | None

SIGMA_SPACINGS = ("karras", "exponential", "beta")
NO_LIMIT = 1e30  # rows that clip x_0, but to nothing: thresholding does it


@dataclass
class StepOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: the next state, like ``sample``.
        pred_original_sample: the x_0 that the step went towards, like ``sample``.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclass
class Plan:
    """The grid that ``set_timesteps`` chose.

    Attributes:
        schedule, grid: noise levels, in the variance-preserving form.
        table: all rows.
        step: the step of each row.
        timesteps: t of each row, and ``values``, the same as numbers.
        alone: whether each step can be taken by itself, in any order.
        tables: those made so far, and their rows as numbers.
    """

    schedule: DiffusionSchedule
    grid: Grid
    table: StepTable
    step: list[int]
    timesteps: Tensor
    values: list[float]
    alone: bool
    tables: dict[Any, Rows] = field(default_factory=dict)

    def begins(self, row: int) -> bool:
        """Whether a step begins with a row."""
        return row == 0 or self.step[row] != self.step[row - 1]


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        row: the row of the next step.
        start: the row of the first step.
        state: what the sampler keeps: y, h1, h2, h3.
    """

    row: int
    start: int
    state: dict[str, Any]


Output = StepOutput | tuple[Tensor, ...]


class TableScheduler:
    """A mixin in front of a diffusers scheduler. Its classes say which settings they have.

    A step reads nothing from the device: the row is counted on the host. To make sure of it, the
    timestep is compared with the counter where that needs no waiting, that is if it is a number, on
    the CPU, or an element of ``timesteps`` itself (known by its address).
    """

    timesteps_dtype: ClassVar[torch.dtype] = torch.int64
    noise_dtype: ClassVar[torch.dtype | None] = None  # None: that of the model's output
    # Settings of the diffusers scheduler that are not all supported, with those that are.
    supported: ClassVar[Supported] = {}
    # Whether diffusers steps before set_timesteps, through all timesteps.
    ready_at_once: ClassVar[bool] = False
    each_alone: ClassVar[bool] = True  # whether a step's row doesn't depend on those after it
    returns_x0: ClassVar[bool] = True  # beside the next state, with return_dict=False

    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    order: int
    _plan: Plan | None = None
    _progress: Progress | None = None
    _begin_index: int | None = None

    def register_to_config(self, **settings: Any) -> None:
        super().register_to_config(**settings)  # type: ignore[misc]
        self.check_config()

    def check_config(self) -> None:
        """
        Raises:
            ValueError: a setting that our samplers don't have.
        """
        spacings = ("leading", "trailing", "linspace")
        known = {"timestep_spacing": spacings, "final_sigmas_type": ("zero", "sigma_min")}
        for name, values in (known | self.supported).items():
            value = self.config.get(name, values[0])
            if value not in values:
                allowed = " or ".join(repr(v) for v in values)
                checks.fail(name, f"{allowed} for {type(self).__name__}", repr(value))
        if sum(bool(self.config.get(f"use_{name}_sigmas")) for name in SIGMA_SPACINGS) > 1:
            names = " and ".join(f"use_{name}_sigmas" for name in SIGMA_SPACINGS)
            checks.fail(names, "at most one of them", "more")

    def sampler(self) -> Sampler:
        """The entry of :data:`diffusion_fast.samplers.SAMPLERS` that the settings mean."""
        theirs = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("diffusers"))
        entry = of_diffusers(theirs.__name__, self.config)
        assert entry is not None, "check_config"
        return entry

    def row_options(self, start: int) -> dict[str, Any]:
        """Options of the sampler that depend on the class's settings, from step ``start`` on."""
        return {}

    def grid_options(self) -> SamplerOptions:
        """The grid, as the settings have it."""
        config = self.config
        first = not config.get("set_alpha_to_one", True)
        first = first or config.get("final_sigmas_type") == "sigma_min"
        chosen = [name for name in SIGMA_SPACINGS if config.get(f"use_{name}_sigmas")]
        return SamplerOptions(
            timestep_spacing=chosen[0] if chosen else config.get("timestep_spacing", "linspace"),
            steps_offset=config.get("steps_offset", 0),
            final_alpha=FINAL_ALPHAS[first],
            sigma_min=config.get("sigma_min"),
            sigma_max=config.get("sigma_max"),
        )

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose the grid and go back to its start.

        Raises:
            ValueError: a number of steps out of range, or settings that our samplers don't have.
        """
        self._choose(num_inference_steps, device)

    def _choose(
        self,
        steps: int | None,
        device: str | torch.device | None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """As ``set_timesteps``, with a grid of the caller's own."""
        self.check_config()
        lists = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: values for name, values in lists.items() if values is not None}
        if len(given) + (steps is not None) != 1:
            names = " or ".join(("num_inference_steps", *lists))
            checks.fail("set_timesteps", f"exactly one of {names}", [*given, steps])
        count = self.config.num_train_timesteps
        schedule = DiffusionSchedule.from_config(self.config)
        options = self.grid_options()
        if given:
            if {options.timestep_spacing, options.sigma_spacing} & {*SIGMA_SPACINGS, "lu"}:
                name = next(iter(given))
                checks.fail(name, "None beside a setting that places noise levels", "a list")
            options = options.replace(**{k: [float(v) for v in vs] for k, vs in given.items()})
            steps = options.count or 1
        else:
            steps = checks.whole_between("num_inference_steps", steps, 1, count)
        options.check()
        self._use(schedule, self.sampler().place(schedule, steps, options), device)
        self.num_inference_steps = len(self._ready().grid)

    def _use(
        self, schedule: DiffusionSchedule, grid: Grid, device: str | torch.device | None = None
    ) -> None:
        table, rows = self._made(grid, len(grid), 0, {})
        t, step = table.timesteps.to(self.timesteps_dtype), table.step_of_row.tolist()
        alone = not table.kept
        self._plan = Plan(schedule, grid, table, step, t.to(device), t.tolist(), alone)
        self._plan.tables[(0,)] = table, rows
        self._progress = self._begin_index = None
        self.timesteps = self._plan.timesteps
        if hasattr(self, "sigmas"):
            self.sigmas = self.noise_levels(grid)

    def _ready(self) -> Plan:
        if self._plan is None and self.ready_at_once:
            schedule = DiffusionSchedule.from_config(self.config)
            every = SamplerOptions(timesteps=range(schedule.timesteps - 1, -1, -1))
            device = self.timesteps.device
            self._use(schedule, self.sampler().place(schedule, schedule.timesteps, every), device)
        if self._plan is None:
            name = "num_inference_steps"
            checks.fail(name, "a call of set_timesteps before the first step", None)
        return self._plan

    def noise_levels(self, grid: Grid) -> Tensor:
        """sigma at each point and at the end, [n + 1] on the CPU."""
        end = grid.next_noise[-1:] / grid.next_signal[-1:]
        return torch.from_numpy(np.append(grid.sigma, end).astype(np.float32))

    def _made(self, grid: Grid, steps: int, start: int, options: dict[str, Any]) -> Rows:
        """The table of a part of the grid, which begins with a step of the whole."""
        config = self.config
        table = table_from_grid(
            self.sampler(),
            grid,
            steps=steps,
            prediction_type=config.prediction_type,
            clip_sample=self._clip(),
            **self.row_options(start),
            **options,
        )
        return table, table.rows.tolist()

    def _clip(self) -> float:
        if self.config.get("thresholding"):
            return NO_LIMIT
        return self.config.clip_sample_range if self.config.get("clip_sample") else False

    @property
    def step_index(self) -> int | None:
        """The row of the next step; None before the first."""
        return None if self._progress is None else self._progress.row

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The row that the next run begins with, for image-to-image."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input; ``sample`` itself but for Euler and Heun."""
        return sample

    def _advance(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generators,
        variance_noise: Tensor | None,
        return_dict: bool,
        **options: Any,
    ) -> StepOutput | tuple[Tensor, ...]:
        """The next state: what every ``step`` does.

        Args:
            model_output: [B, ...], like ``sample``, with guidance applied.
            timestep: an element of ``timesteps``; the steps go in their order.
            sample: the state; it is left as it is.
            generator: source of noise, for samplers that draw some.
            variance_noise: that noise itself, like ``sample``.
            return_dict: False for a tuple in place of the two results' names.
            options: options of the sampler that depend on the call.

        Raises:
            ValueError: tensors that don't match, or a timestep that is not the next one.
        """
        plan, row = self._ready(), self._row_of(timestep)
        start = row if plan.alone or self._progress is None else self._progress.start
        table, rows = self._rows(plan.step[start], options)
        coefficients = rows[row - start]

        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, m = sample.to(dtype, copy=True), model_output
        progress = self._progress
        if progress is None:
            state: dict[str, Any] = {name: torch.zeros_like(x) for name in table.kept}
            progress = Progress(row, start, state)
        noise = variance_noise
        if noise is None and table.draws[row - start]:
            noise = randn_tensor(m.shape, generator, m.device, self.noise_dtype or m.dtype)
        noise = None if noise is None else noise.to(dtype)
        x0 = _x0(x, m.to(dtype), coefficients)
        if self.config.get("thresholding"):
            x0 = self._threshold_sample(x0)  # type: ignore[attr-defined]
            coefficients, noise = _beside(coefficients, m.to(dtype), noise)
            m = x0
        sampler_step(x, m, [coefficients], 0, noise=noise, **progress.state)
        x0 = self.predicted(
            sample.to(dtype), x0, m, coefficients, float(table.next_levels[row - start, 0])
        )
        progress.row = row + 1
        self._progress = progress
        prev = x.to(sample.dtype)
        if return_dict:
            return StepOutput(prev, x0.to(sample.dtype))
        return (prev, x0.to(sample.dtype)) if self.returns_x0 else (prev,)

    def predicted(
        self, x: Tensor, x0: Tensor, m: Tensor, row: list[float], signal: float
    ) -> Tensor:
        """What a step returns beside the next state, of level A' = ``signal``: x_0."""
        return x0

    def _rows(self, start: int, options: dict[str, Any]) -> Rows:
        """The table that begins with a step, and its rows as numbers for ``sampler_step``."""
        plan = self._ready()
        key = start, *options.items()
        if key not in plan.tables:
            part = plan.grid.part(start, start + 1 if plan.alone and self.each_alone else None)
            plan.tables[key] = self._made(part, len(plan.values), start, options)
        return plan.tables[key]

    def _row_of(self, timestep: Any) -> int:
        """The counter's, or the timestep's where steps may go in any order."""
        plan, progress = self._ready(), self._progress
        row = (self._begin_index or 0) if progress is None else progress.row
        found = self._locate(timestep, row)
        if found is None or found == row:
            if row >= len(plan.values):
                checks.fail("timestep", f"at most {len(plan.values)} steps", "one more")
            return row
        if not plan.alone and not (progress is None and plan.begins(found)):
            checks.fail(
                "timestep", f"the next of timesteps, number {row}", f"number {found}: {timestep}"
            )
        return found

    def _locate(self, timestep: Any, expected: int) -> int | None:
        """Which of ``timesteps`` it is; None if it takes a wait for the device to know."""
        plan = self._ready()
        if isinstance(timestep, Tensor):
            own = plan.timesteps
            same = timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            if same and timestep.dtype == own.dtype and timestep.numel() == 1:
                return int(timestep.storage_offset())
            if timestep.device.type != "cpu" or timestep.numel() != 1:
                return None
        value = float(timestep)
        found = [i for i, t in enumerate(plan.values) if t == value]
        if not found:
            return self.elsewhere(value)
        if expected in found:
            return expected
        return next((i for i in found if plan.begins(i)), found[0])  # where a step begins

    def elsewhere(self, t: float) -> int:
        """The row of a time that is none of the timesteps."""
        checks.fail("timestep", "one of timesteps (see set_timesteps)", t)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples noised to the level of timesteps [B] of the grid (or of the training schedule).

        Nothing is read from the device.
        """
        signal, sigma = self._levels(timesteps, original_samples)
        return signal * original_samples + sigma * noise

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and S at timesteps [B], to multiply ``like`` [B, ...] with."""
        t, plan = timesteps.to(like.device).reshape(-1), self._plan
        schedule = plan.schedule if plan else DiffusionSchedule.from_config(self.config)
        abar = schedule.alpha_bar
        levels = _on(like.device, np.sqrt(abar), np.sqrt(1 - abar))[:, t.long()]  # [2, B]
        if plan is not None:
            own = _on(like.device, *plan.table.levels.numpy().T)
            same = t[:, None] == plan.timesteps.to(like.device)  # [B, N]
            levels = torch.where(same.any(1), own[:, same.to(torch.uint8).argmax(1)], levels)
        signal, noise = levels.to(like.dtype).view(2, -1, *(1,) * (like.dim() - 1))
        return signal, noise


class Drawing(TableScheduler):
    """Of samplers that draw noise."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
    ) -> Output:
        """The next state, with diffusers' arguments."""
        return self._advance(model_output, timestep, sample, generator, variance_noise, return_dict)


class Deterministic(TableScheduler):
    """Of samplers that draw no noise, whose ``step`` diffusers gives no generator."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
    ) -> Output:
        """The next state, with diffusers' arguments; no noise is drawn."""
        return self._advance(model_output, timestep, sample, generator, variance_noise, return_dict)


def in_sigma_form(table: StepTable) -> StepTable:
    """The same sampler with x_0 + sigma epsilon as its state: x / A before a row, x' / A' after."""
    rows = table.rows.clone()
    before, after = table.levels[:, 0], table.next_levels[:, 0]
    for name in ("a", "c_x", "d_x", "e_x"):
        rows[:, INDEX[name]] *= before
    for name in ("c_x", "c_0", "c_1", "c_2", "c_3", "c_y", "c_m", "s"):
        rows[:, INDEX[name]] /= after
    return dataclasses.replace(table, rows=rows)


def _x0(x: Tensor, model_output: Tensor, row: list[float]) -> Tensor:
    a, b, clip = (row[INDEX[name]] for name in ("a", "b", "clip"))
    x0 = a * x + b * model_output
    return x0 if clip == math.inf else x0.clamp(-clip, clip)


def _beside(
    row: list[float], model_output: Tensor, noise: Tensor | None
) -> tuple[list[float], Tensor]:
    """The same row for a model that predicts x_0 itself: what it reads of the model's own output
    joins the noise."""
    changed = list(row)
    weight, s = row[INDEX["c_m"]], row[INDEX["s"]]
    for name, value in {"a": 0.0, "b": 1.0, "c_m": 0.0, "s": 1.0}.items():
        changed[INDEX[name]] = value
    own = weight * model_output
    return changed, own if noise is None else own + s * noise


def _on(device: torch.device, *tables: FloatArray) -> Tensor:
    return torch.from_numpy(np.stack(tables)).to(device, torch.float32)
