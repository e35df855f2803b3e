"""Schedulers of diffusers whose state is x_0 + sigma epsilon: Euler, Heun, LMS, DPM2 and DPM++ SDE.

The refusals of :mod:`.schedulers` hold for them too.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops import checks
from ...samplers import SamplerOptions
from ...samplers.grids import Grid
from ...samplers.table import INDEX
from .table_scheduler import (
    SIGMA_SPACINGS,
    Deterministic,
    Device,
    Drawing,
    Generators,
    Output,
    Rows,
    StepOutput,
    Supported,
    TableScheduler,
    in_sigma_form,
)


class SigmaScheduler(TableScheduler):
    """A state x_0 + sigma epsilon, which the model sees divided by sqrt(1 + sigma^2)."""

    timesteps_dtype = torch.float32
    ready_at_once = True
    alphas_cumprod: Tensor

    def grid_options(self) -> SamplerOptions:
        options, spacing = super().grid_options(), self.config.timestep_spacing
        if options.timestep_spacing in SIGMA_SPACINGS:
            return options.replace(sigma_spacing=options.timestep_spacing, timestep_spacing=spacing)
        if self.config.get("interpolation_type") == "log_linear":
            return options.replace(sigma_spacing="log_linear")
        return options

    def _made(self, grid: Grid, steps: int, start: int, options: dict[str, Any]) -> Rows:
        table = in_sigma_form(super()._made(grid, steps, start, options)[0])
        return table, table.rows.tolist()

    def _all_timesteps(self, device: Device) -> None:
        """Those of the schedule, before a number of steps is chosen; a run may begin there."""
        t = torch.arange(len(self.alphas_cumprod) - 1, -1, -1)
        self.timesteps = t.to(device, self.timesteps_dtype)
        levels = self.alphas_cumprod.flip(0)
        self.sigmas = ((1 - levels) / levels).sqrt()
        self.num_inference_steps = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        row = self._row_of(timestep)
        return sample * float(self._ready().table.levels[row, 0])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples + sigma noise; see the other schedulers' ``add_noise``."""
        signal, sigma = self._levels(timesteps, original_samples)
        return original_samples + sigma / signal * noise


class DiffusionFastEuler(SigmaScheduler, diffusers.EulerDiscreteScheduler):
    """``EulerDiscreteScheduler``, with every spacing of noise levels, and churn."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }

    def check_config(self) -> None:
        super().check_config()
        config = self.config
        if (config.get("timestep_type"), config.get("prediction_type")) == (
            "continuous",
            "v_prediction",
        ):
            checks.fail("timestep_type", "'discrete' with v_prediction", "'continuous'")

    def noise_levels(self, grid: Grid) -> Tensor:
        """[n + 1]; log-linear ones have a last level of their own, before the final one."""
        sigmas = super().noise_levels(grid)
        if self.config.get("interpolation_type") != "log_linear":
            return sigmas
        final = sigmas[-1:] if self.config.final_sigmas_type == "sigma_min" else sigmas.new_zeros(1)
        return torch.cat((sigmas, final))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """As the other schedulers'; or the grid itself.

        Args:
            timesteps: decreasing, one for each step.
            sigmas: decreasing noise levels, one more than there are steps.
        """
        self._choose(num_inference_steps, device, timesteps, sigmas)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
    ) -> Output:
        """The next state, with diffusers' arguments.

        Args:
            s_churn: noise to add before each step (Karras et al. 2022, algorithm 2), as diffusers
                does it: after the model's call.
            s_tmin, s_tmax: the noise levels between which noise is added.
            s_noise: a factor of that noise.
        """
        plan = self._ready()
        sigma = float(plan.grid.sigma[plan.step[self._row_of(timestep)]])
        gamma = min(s_churn / len(plan.grid), math.sqrt(2) - 1)
        if gamma <= 0 or not s_tmin <= sigma <= s_tmax:
            return self._advance(
                model_output, timestep, sample, generator, variance_noise, return_dict
            )
        noise = variance_noise
        if noise is None:
            noise = randn_tensor(sample.shape, generator, sample.device, model_output.dtype)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        raised = s_noise * sigma * math.sqrt((gamma + 1) ** 2 - 1)
        x = torch.add(sample.to(dtype), noise.to(dtype), alpha=raised)
        results = self._advance(model_output, timestep, x, None, None, False, gamma=gamma)
        prev, x0 = (one.to(sample.dtype) for one in results)
        return StepOutput(prev, x0) if return_dict else (prev, x0)

    def _made(self, grid: Grid, steps: int, start: int, options: dict[str, Any]) -> Rows:
        gamma = options.get("gamma", 0.0)
        rest = {name: value for name, value in options.items() if name != "gamma"}
        table, rows = super()._made(grid, steps, start, rest)
        if gamma:  # Euler from a raised noise level, which only epsilon is told
            sigma, after = float(grid.sigma[0]), float(grid.next_noise[0] / grid.next_signal[0])
            row, raised = rows[0], sigma * (gamma + 1)
            if self.config.prediction_type == "epsilon":
                row[INDEX["a"]], row[INDEX["b"]] = 1.0, -raised
            slope = after / raised - 1
            changes = {
                "c_x": 1 + slope * (1 - row[INDEX["a"]]),
                "c_m": -slope * row[INDEX["b"]],
                "c_0": 0.0,
            }
            for name, value in changes.items():
                row[INDEX[name]] = value
        return table, rows


class DiffusionFastEulerAncestral(
    Drawing, SigmaScheduler, diffusers.EulerAncestralDiscreteScheduler
):
    """``EulerAncestralDiscreteScheduler``."""

    __module__ = "diffusion_fast"


class _Pairs(SigmaScheduler):
    """Two model calls a step, of which the last step has one, or which diffusers counts so."""

    def noise_levels(self, grid: Grid) -> Tensor:
        """[2n]: each but the ends twice, as diffusers keeps them."""
        sigmas = super().noise_levels(grid)
        return torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))


class DiffusionFastHeun(Deterministic, _Pairs, diffusers.HeunDiscreteScheduler):
    """``HeunDiscreteScheduler``: two model calls for each step but the last."""

    __module__ = "diffusion_fast"
    alphas_cumprod: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """As the other schedulers', or ``timesteps`` themselves, decreasing.

        ``num_train_timesteps`` is what diffusers' constructor passes: the timesteps are all of the
        schedule's then, and a run may begin there.
        """
        if num_train_timesteps is None:
            return self._choose(num_inference_steps, device, timesteps)
        self._all_timesteps(device)
        self.timesteps = self.timesteps.repeat_interleave(2)[1:]


class DiffusionFastLMS(SigmaScheduler, diffusers.LMSDiscreteScheduler):
    """``LMSDiscreteScheduler``. A run that begins within the timesteps has no history there."""

    __module__ = "diffusion_fast"

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """As the other schedulers'."""
        if "is_scale_input_called" in vars(self):
            return self._choose(num_inference_steps, device)
        self._all_timesteps(device)  # diffusers' constructor calls it

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
        *,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
    ) -> Output:
        """The next state, with diffusers' arguments; no noise is drawn.

        Args:
            order: at how many calls it looks, 1 to 4.
        """
        more: dict[str, Any] = {} if order == 4 else {"order": order}
        noise = generator, variance_noise
        return self._advance(model_output, timestep, sample, *noise, return_dict, **more)


class _Midpoint(SigmaScheduler):
    """Two model calls a step, the second between two noise levels."""

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: Device = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """As the other schedulers'. ``num_train_timesteps`` is what diffusers' constructors pass:
        the timesteps are all of the schedule's then, and a run may begin there."""
        if num_train_timesteps is None:
            return self._choose(num_inference_steps, device)
        self._all_timesteps(device)


class DiffusionFastKDPM2(Deterministic, _Midpoint, diffusers.KDPM2DiscreteScheduler):
    """``KDPM2DiscreteScheduler``."""

    __module__ = "diffusion_fast"

    def grid_options(self) -> SamplerOptions:
        return _whole_karras(super().grid_options())

    def noise_levels(self, grid: Grid) -> Tensor:
        """[2n + 1]: each but the first twice, as diffusers keeps them."""
        return _doubled(super().noise_levels(grid))


class DiffusionFastKDPM2Ancestral(Drawing, _Midpoint, diffusers.KDPM2AncestralDiscreteScheduler):
    """``KDPM2AncestralDiscreteScheduler``."""

    __module__ = "diffusion_fast"

    def grid_options(self) -> SamplerOptions:
        return _whole_karras(super().grid_options())

    def noise_levels(self, grid: Grid) -> Tensor:
        """[2n + 2]: each but the first twice, as diffusers keeps them."""
        return _doubled(super().noise_levels(grid))


def _whole_karras(options: SamplerOptions) -> SamplerOptions:
    return options.replace(whole_timesteps=options.sigma_spacing == "karras")


def _doubled(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]))


class DiffusionFastDPMSolverSDE(_Pairs, _Midpoint, diffusers.DPMSolverSDEScheduler):
    """``DPMSolverSDEScheduler``, its noise from a Brownian tree (the package torchsde)."""

    __module__ = "diffusion_fast"
    timesteps_dtype = torch.float64
    noise_sampler: Any
    noise_sampler_seed: Any

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: Device = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """As the other schedulers'."""
        super().set_timesteps(num_inference_steps, device, num_train_timesteps)
        ours, timesteps = self.sigmas, self.timesteps
        count = num_inference_steps, device, num_train_timesteps
        diffusers.DPMSolverSDEScheduler.set_timesteps(self, *count)
        self.timesteps = timesteps
        if len(self.sigmas) != len(ours):
            self.sigmas = ours  # else diffusers' own, to the last bit: the path's values hang on it

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
        *,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
    ) -> Output:
        """The next state, with diffusers' arguments.

        Args:
            s_noise: a factor of the noise.
            variance_noise: the noise of this half of a step, in place of the tree's.
        """
        row = self._row_of(timestep)
        if variance_noise is None and bool(self._ready().table.draws[row]):
            variance_noise = self._noise(row, sample)
        more: dict[str, Any] = {} if s_noise == 1 else {"s_noise": s_noise}
        noise = generator, variance_noise
        return self._advance(model_output, timestep, sample, *noise, return_dict, **more)

    def _noise(self, row: int, sample: Tensor) -> Tensor:
        """The increment of the path in sigma over the row, as standard normal noise."""
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        if self.noise_sampler is None:
            ends = float(self.sigmas[self.sigmas > 0].min()), float(self.sigmas.max())
            self.noise_sampler = BrownianTreeNoiseSampler(sample, *ends, self.noise_sampler_seed)
        start, end = self.sigmas[row - row % 2 : row - row % 2 + 2]  # in float32, as diffusers does
        t, t_end = -start.log(), -end.log()
        middle = (-(t + (t_end - t) * 0.5)).exp()
        start, end = (-t).exp(), (-t_end).exp()
        if row % 2 == 0:
            self._half: Tensor = self.noise_sampler(start, middle)
            return self._half
        # The tree is asked what diffusers asks it: its answers depend on that a little.
        whole = self.noise_sampler(start, end) * (start - end).sqrt()
        rest: Tensor = whole - self._half * (start - middle).sqrt()
        return rest / (middle - end).sqrt()
