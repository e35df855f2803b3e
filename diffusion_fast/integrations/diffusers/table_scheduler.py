"""What all our schedulers for diffusers share: a table of rows, and a counter of steps on the host.

Configuration, defaults and names come from the diffusers scheduler that each one is derived from;
timesteps, steps and noise levels from :mod:`diffusion_fast.samplers`. Where diffusers keeps
x_0 + sigma epsilon (Euler, Heun), so do these, and so its pipelines and callbacks find what they
expect; :func:`in_sigma_form` rewrites the rows for it.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops import checks, sampler_step
from ...samplers import StepTable, table_from_grid
from ...samplers.grids import LEAST_ALPHA_BAR, Grid
from ...samplers.table import INDEX
from ...schedule import DiffusionSchedule, FloatArray

Supported = dict[str, tuple[Any, ...]]
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class StepOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: the next state, like ``sample``.
        pred_original_sample: the x_0 that the step went towards, like ``sample``.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class TableScheduler:
    """A mixin in front of a diffusers scheduler. Its classes say which sampler and grid they have.

    A step reads nothing from the device: the row is counted on the host. To make sure of it, the
    timestep is compared with the counter where that needs no waiting, that is if it is a number, on
    the CPU, or an element of ``timesteps`` itself (known by its address).
    """

    make_grid: ClassVar[Callable[..., Grid]]
    timesteps_dtype: ClassVar[torch.dtype] = torch.int64
    noise_dtype: ClassVar[torch.dtype | None] = None  # None: that of the model's output
    # Settings of the diffusers scheduler that are not all supported, with those that are.
    supported: ClassVar[Supported] = {}

    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    order: int

    def register_to_config(self, **settings: Any) -> None:
        super().register_to_config(**settings)  # type: ignore[misc]
        self.check_config()

    def check_config(self) -> None:
        """
        Raises:
            ValueError: a setting that our samplers don't have.
        """
        for name, values in self.supported.items():
            value = self.config.get(name, values[0])
            if value not in values:
                allowed = " or ".join(repr(v) for v in values)
                checks.fail(name, f"{allowed} for {type(self).__name__}", repr(value))

    def sampler(self) -> str:
        """The sampler's name in :data:`diffusion_fast.samplers.SAMPLERS`."""
        raise NotImplementedError

    def table_options(self) -> dict[str, Any]:
        """Arguments for ``table_from_grid`` that depend on the sampler."""
        return {}

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose the grid and go back to its start.

        Raises:
            ValueError: a number of steps out of range, or settings that our samplers don't have.
        """
        self.check_config()
        checks.positive_int("num_inference_steps", num_inference_steps)
        count = self.config.num_train_timesteps
        if num_inference_steps > count:
            checks.fail("num_inference_steps", f"at most {count}", num_inference_steps)
        self._schedule = DiffusionSchedule.from_config(self.config)
        self._grid = self.grid(num_inference_steps)
        self._tables: dict[tuple[int, float], tuple[StepTable, list[list[float]]]] = {}
        self.num_inference_steps = num_inference_steps
        table = self._table(0)[0]
        self._keeps_state = table.needs_y or table.needs_h1  # a step depends on those before it
        t = table.timesteps.to(self.timesteps_dtype)
        self._t: list[float] = t.tolist()
        self.timesteps = self._own_timesteps = t.to(device)
        if hasattr(self, "sigmas"):
            self.sigmas = self._sigmas()
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def grid(self, steps: int) -> Grid:
        config = self.config
        first = not config.get("set_alpha_to_one", True)
        first = first or config.get("final_sigmas_type", "zero") == "sigma_min"
        karras = config.get("use_karras_sigmas", False)
        spacing = "karras" if karras else config.timestep_spacing
        final = "first" if first else "one"
        return type(self).make_grid(self._schedule, steps, spacing, config.steps_offset, final)

    def _sigmas(self) -> Tensor:
        """[n + 1] on the CPU."""
        end = self._grid.next_noise[-1:] / self._grid.next_signal[-1:]
        return torch.from_numpy(np.append(self._grid.sigma, end).astype(np.float32))

    def _table(self, start: int, eta: float = 0.0) -> tuple[StepTable, list[list[float]]]:
        """The table that begins with a step, and its rows as numbers for ``sampler_step``."""
        if (start, eta) not in self._tables:
            config = self.config
            table = table_from_grid(
                self.sampler(),
                self._grid.tail(start),
                prediction_type=config.prediction_type,
                eta=eta,
                clip_sample=config.clip_sample_range if config.get("clip_sample") else False,
                **self.table_options(),
            )
            table = self.in_outer_form(table)
            self._tables[start, eta] = table, table.rows.tolist()
        return self._tables[start, eta]

    def in_outer_form(self, table: StepTable) -> StepTable:
        return table

    @property
    def step_index(self) -> int | None:
        """The row of the next step; None before the first."""
        return getattr(self, "_step_index", None)

    @property
    def begin_index(self) -> int | None:
        return getattr(self, "_begin_index", None)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The row that the next run begins with, for image-to-image."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input; ``sample`` itself but for Euler and Heun."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        *,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """The next state.

        Args:
            model_output: [B, ...], like ``sample``, with guidance applied.
            timestep: an element of ``timesteps``; the steps go in their order.
            sample: the state; it is left as it is.
            generator: for samplers that draw noise.
            variance_noise: that noise itself, like ``sample``.
            return_dict: False for a tuple of the next state alone.

        Raises:
            ValueError: tensors that don't match, or a timestep that is not the next one.
        """
        return self._advance(
            model_output, timestep, sample, 0.0, generator, variance_noise, return_dict
        )

    def _advance(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float,
        generator: Generators,
        variance_noise: Tensor | None,
        return_dict: bool,
    ) -> StepOutput | tuple[Tensor]:
        row = self._row_of(timestep)
        if self._step_index is None:
            self._start = row
        start = self._start if self._keeps_state else 0
        table, rows = self._table(start // self.order, eta)
        number = row - start

        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype, copy=True)
        if self._step_index is None:
            self._state = {
                name: torch.zeros_like(x)
                for name in ("y", "h1", "h2")
                if getattr(table, f"needs_{name}")
            }
        noise = variance_noise
        if noise is None and rows[number][INDEX["s"]]:
            noise = randn_tensor(
                model_output.shape,
                generator=generator,
                device=model_output.device,
                dtype=self.noise_dtype or model_output.dtype,
            )
        noise = None if noise is None else noise.to(dtype)
        x0 = _x0(sample, model_output, rows[number]) if return_dict else None
        y, h1, h2 = (self._state.get(name) for name in ("y", "h1", "h2"))
        sampler_step(x, model_output, rows, number, noise=noise, y=y, h1=h1, h2=h2)
        self._step_index = row + 1
        prev = x.to(sample.dtype)
        return (prev,) if x0 is None else StepOutput(prev, x0.to(sample.dtype))

    def _row_of(self, timestep: Any) -> int:
        """The counter's, or the timestep's where steps may go in any order."""
        if self.num_inference_steps is None:
            checks.fail(
                "num_inference_steps", "a call of set_timesteps before the first step", None
            )
        begins, row = self._step_index is None, self._step_index
        if row is None:
            row = self._begin_index or 0
        found = self._locate(timestep, row)
        if found is None or found == row:
            if row >= len(self._t):
                checks.fail("timestep", f"at most {len(self._t)} steps", "one more")
            return row
        if self._keeps_state and not (begins and found % self.order == 0):
            checks.fail(
                "timestep", f"the next of timesteps, number {row}", f"number {found}: {timestep}"
            )
        return found

    def _locate(self, timestep: Any, expected: int) -> int | None:
        """Which of ``timesteps`` it is; None if it takes a wait for the device to know."""
        if isinstance(timestep, Tensor):
            own = self._own_timesteps
            same = timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            if same and timestep.dtype == own.dtype and timestep.numel() == 1:
                return int(timestep.storage_offset())
            if timestep.device.type != "cpu" or timestep.numel() != 1:
                return None
        value = float(timestep)
        found = [i for i, t in enumerate(self._t) if t == value]
        if not found:
            checks.fail("timestep", "one of timesteps (see set_timesteps)", value)
        if expected in found:
            return expected
        return next((i for i in found if i % self.order == 0), found[0])  # where a step begins

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples noised to the level of timesteps [B] of the grid (or of the training schedule).

        Nothing is read from the device.
        """
        signal, sigma = self._levels(timesteps, original_samples)
        return signal * original_samples + sigma * noise

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and S at timesteps [B], to multiply ``like`` [B, ...] with."""
        t = timesteps.to(like.device).reshape(-1)
        schedule = getattr(self, "_schedule", None) or DiffusionSchedule.from_config(self.config)
        abar = schedule.alpha_bar
        levels = _on(like.device, np.sqrt(abar), np.sqrt(1 - abar))[:, t.long()]  # [2, B]
        if self.num_inference_steps is not None:
            grid, point = self._grid, self._points()
            own = _on(like.device, grid.signal[point], grid.noise[point])
            same = t[:, None] == self._own_timesteps.to(like.device)  # [B, N]
            levels = torch.where(same.any(1), own[:, same.to(torch.uint8).argmax(1)], levels)
        signal, noise = levels.to(like.dtype).view(2, -1, *(1,) * (like.dim() - 1))
        return signal, noise

    def _points(self) -> np.ndarray:
        """The grid point of each row."""
        return (np.arange(len(self._t)) + self.order - 1) // self.order


def in_sigma_form(table: StepTable, signal: FloatArray, next_signal: FloatArray) -> StepTable:
    """The same sampler with x_0 + sigma epsilon as its state: x / A before a row, x' / A' after it.

    Args:
        signal, next_signal: A of the state that each row reads and writes, [N].
    """
    rows = table.rows.clone()
    before, after = torch.from_numpy(signal), torch.from_numpy(next_signal)
    for name in ("a", "c_x", "d_x"):
        rows[:, INDEX[name]] *= before
    for name in ("c_x", "c_0", "c_1", "c_2", "c_y", "c_m", "s"):
        rows[:, INDEX[name]] /= after
    return dataclasses.replace(table, rows=rows)


def karras(grid: Grid, schedule: DiffusionSchedule, low: float | None, high: float | None) -> Grid:
    """Karras et al. (2022, eq. 5) between a grid's ends, or given sigmas; t is fractional."""
    first, last = (high or grid.sigma[0]) ** (1 / 7), (low or grid.sigma[-1]) ** (1 / 7)
    sigma = np.linspace(first, last, len(grid)) ** 7
    abar = np.maximum(schedule.alpha_bar, LEAST_ALPHA_BAR)
    levels = np.sqrt((1 - abar) / abar)
    t = np.interp(np.log(sigma), np.log(levels), np.arange(len(levels)))
    return Grid.from_sigmas(np.append(sigma, grid.next_noise[-1] / grid.next_signal[-1]), t)


def _x0(sample: Tensor, model_output: Tensor, row: list[float]) -> Tensor:
    a, b, clip = (row[INDEX[name]] for name in ("a", "b", "clip"))
    dtype = torch.promote_types(sample.dtype, torch.float32)
    x0 = a * sample.to(dtype) + b * model_output.to(dtype)
    return x0 if clip == math.inf else x0.clamp(-clip, clip)


def _on(device: torch.device, *tables: FloatArray) -> Tensor:
    return torch.from_numpy(np.stack(tables)).to(device, torch.float32)
