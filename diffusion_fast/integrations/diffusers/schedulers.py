"""Our samplers as schedulers of diffusers: drop-in, on its own grids, equal to its own to rounding.

    pipe.scheduler = DiffusionFastDPMSolver.from_config(pipe.scheduler.config)

Each one takes the configuration of the diffusers scheduler that it is derived from. Differences
from diffusers are those of :mod:`diffusion_fast.samplers.grids`, where diffusers' grid is broken,
and these refusals, each by name:

==============================================  ==================================================
``variance_type`` learned or learned_range      the noise depends on the model's output: no row of
(DDPM), fixed_large_log                         numbers; fixed_large_log takes the root of a
                                                negative number in diffusers
an unknown ``variance_type``,                   diffusers takes a misspelt name for a default
``timestep_spacing``, ``final_sigmas_type``
betas outside (0, 1)                            there is no such Gaussian
``solver_order=3`` with sde-dpmsolver++         diffusers' formula has a wrong sign (and no formula
or sde-dpmsolver; thresholding with dpmsolver   for sde-dpmsolver); its history holds epsilon
``use_flow_sigmas``, ``use_dynamic_shifting``,  for flow matching, another kind of model
``shift_terminal``
``timestep_type="continuous"`` with v           for networks that are told log(sigma) / 4, as EDM's
``solver_p``, ``predict_x0=False`` (UniPC)      a scheduler within one; a history of epsilon
``original_inference_steps`` not 50 (LCM),      the timesteps are those of the distillation; a run
``strength``                                    from an image begins within them
a timestep that is not the next one             steps that depend on those before them (DDIM takes
                                                any, Euler and DDPM any of ``timesteps``)
==============================================  ==================================================
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin as SchedulerMixin  # by it diffusers knows its schedulers
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops import checks
from ...samplers import SamplerOptions
from ...samplers.consistency import TIMESTEP_SCALING, TRAINED_STEPS
from ...samplers.grids import Grid, ddim_steps
from ...samplers.table import INDEX
from .table_scheduler import (
    SIGMA_SPACINGS,
    Generators,
    Rows,
    StepOutput,
    Supported,
    TableScheduler,
    in_sigma_form,
)

_OFF = (False, None)
_NO_FLOW = {"use_flow_sigmas": _OFF, "use_dynamic_shifting": _OFF}
Device = str | torch.device | None
Output = StepOutput | tuple[Tensor, ...]


class DiffusionFastDDPM(TableScheduler, diffusers.DDPMScheduler):
    """``DDPMScheduler``: ancestral sampling; variances ``fixed_small`` and ``fixed_large``."""

    __module__ = "diffusion_fast"  # as model_index.json is to name it
    ready_at_once = True
    supported: ClassVar[Supported] = {
        "variance_type": ("fixed_small", "fixed_large", "fixed_small_log")
    }

    def row_options(self, start: int) -> dict[str, Any]:
        return {"variance": self.config.variance_type.split("_")[1]}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """As the other schedulers', or ``timesteps`` themselves, decreasing."""
        self._choose(num_inference_steps, device, timesteps)
        self.custom_timesteps = timesteps is not None

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


class DiffusionFastDDIM(TableScheduler, diffusers.DDIMScheduler):
    """``DDIMScheduler``, with eta. Any whole timestep may be stepped from."""

    __module__ = "diffusion_fast"

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """The next state, with diffusers' arguments.

        Args:
            eta: in [0, 1], how much of the posterior's noise to add.
            use_clipped_model_output: take epsilon from the clipped x_0, not from the model.
        """
        return self._advance(
            model_output,
            timestep,
            sample,
            generator,
            variance_noise,
            return_dict,
            eta=eta,
            clipped_direction=use_clipped_model_output,
        )

    def elsewhere(self, t: float) -> int:
        plan, count = self._ready(), self.config.num_train_timesteps
        if t != int(t) or not 0 <= t < count:
            checks.fail("timestep", f"a whole number in [0, {count})", t)
        distance = count // (self.num_inference_steps or count)
        one = ddim_steps(plan.schedule, np.array([int(t)]), distance, self.grid_options())
        plan.grid = plan.grid.then(one)
        plan.values.append(t)
        return len(plan.values) - 1


class _Solver(TableScheduler):
    returns_x0 = False

    def elsewhere(self, t: float) -> int:
        """A time below all timesteps means the last step, as in diffusers."""
        values = self._ready().values
        return len(values) - 1 if 0 <= t < values[-1] else super().elsewhere(t)


class DiffusionFastDPMSolver(_Solver, diffusers.DPMSolverMultistepScheduler):
    """``DPMSolverMultistepScheduler``: DPM-Solver++ of order 1, 2 or 3, the SDE of order 1 or 2.

    Order 3 is as diffusers writes it (``dpmpp_3m_diffusers``).
    """

    __module__ = "diffusion_fast"
    noise_dtype = torch.float32
    supported: ClassVar[Supported] = {
        "algorithm_type": (
            *("dpmsolver++", "sde-dpmsolver++", "deis"),
            *("dpmsolver", "sde-dpmsolver"),
        ),
        "solver_order": (2, 1, 3),
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
        **_NO_FLOW,
        "variance_type": (None, "learned", "learned_range"),
    }

    def check_config(self) -> None:
        super().check_config()
        algorithm, order = self.config.get("algorithm_type"), self.config.solver_order
        if str(algorithm).startswith("sde") and order == 3:
            checks.fail("solver_order", f"1 or 2 for {algorithm}", order)
        if self.config.get("thresholding") and not str(algorithm).endswith("++"):
            checks.fail("thresholding", f"False for {algorithm}", True)

    def grid_options(self) -> SamplerOptions:
        options, lowest = super().grid_options(), self.config.get("lambda_min_clipped", -math.inf)
        if self.config.get("use_lu_lambdas"):
            options = options.replace(timestep_spacing="lu")
        return options.replace(lambda_min=None if lowest == -math.inf else lowest)

    def row_options(self, start: int) -> dict[str, Any]:
        config = self.config
        return {
            "lower_order_final": config.lower_order_final,
            "euler_at_final": config.euler_at_final,
        }

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """As the other schedulers', or ``timesteps`` themselves, decreasing.

        ``mu`` is for flow matching: None.
        """
        if mu is not None:
            checks.fail("mu", "None (it is for flow matching)", mu)
        self._choose(num_inference_steps, device, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """The next state, with diffusers' arguments; a learned variance is left out."""
        if self.config.variance_type is not None:
            model_output = model_output[:, : sample.shape[1]]
        return self._advance(model_output, timestep, sample, generator, variance_noise, return_dict)


class DiffusionFastUniPC(_Solver, diffusers.UniPCMultistepScheduler):
    """``UniPCMultistepScheduler`` of order 1, 2 or 3, with ``bh1`` or ``bh2``."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "solver_order": (2, 1, 3),
        "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
        "solver_p": (None,),
        **_NO_FLOW,
        "shift_terminal": (None,),
    }

    def row_options(self, start: int) -> dict[str, Any]:
        config = self.config
        return {
            "lower_order_final": config.lower_order_final,
            "disable_corrector": tuple(
                step - start for step in config.disable_corrector or () if step >= start
            ),
        }

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


class _SigmaScheduler(TableScheduler):
    """A state x_0 + sigma epsilon, which the model sees divided by sqrt(1 + sigma^2)."""

    timesteps_dtype = torch.float32
    ready_at_once = True

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

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        row, plan = self._row_of(timestep), self._ready()
        return sample * float(plan.grid.signal[plan.point[row]])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples + sigma noise; see the other schedulers' ``add_noise``."""
        signal, sigma = self._levels(timesteps, original_samples)
        return original_samples + sigma / signal * noise


class DiffusionFastEuler(_SigmaScheduler, diffusers.EulerDiscreteScheduler):
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
        sigma = float(plan.grid.sigma[plan.point[self._row_of(timestep)]])
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


class DiffusionFastEulerAncestral(_SigmaScheduler, diffusers.EulerAncestralDiscreteScheduler):
    """``EulerAncestralDiscreteScheduler``."""

    __module__ = "diffusion_fast"

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


class DiffusionFastHeun(_SigmaScheduler, diffusers.HeunDiscreteScheduler):
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
        count = len(self.alphas_cumprod)
        row = torch.arange(2 * count - 1)
        self.timesteps = (count - 1 - (row + 1) // 2).to(device, self.timesteps_dtype)
        levels = self.alphas_cumprod.flip(0)
        self.sigmas = ((1 - levels) / levels).sqrt()
        self.num_inference_steps = None

    def noise_levels(self, grid: Grid) -> Tensor:
        """[2n]: each but the ends twice, as diffusers keeps them."""
        sigmas = super().noise_levels(grid)
        return torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))

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


class DiffusionFastLCM(TableScheduler, diffusers.LCMScheduler):
    """``LCMScheduler``: latent consistency models, on some of the 50 timesteps of distillation."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "original_inference_steps": (TRAINED_STEPS,),
        "timestep_scaling": (TIMESTEP_SCALING,),
    }
    each_alone = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """As the other schedulers', or ``timesteps`` themselves, decreasing.

        ``original_inference_steps`` is 50 and ``strength`` 1: image-to-image begins within the
        timesteps.
        """
        if original_inference_steps not in (None, TRAINED_STEPS):
            checks.fail("original_inference_steps", f"{TRAINED_STEPS}", original_inference_steps)
        if strength != 1:
            checks.fail("strength", "1", strength)
        self._choose(num_inference_steps, device, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
    ) -> LCMSchedulerOutput | tuple[Tensor, ...]:
        """The next state, with diffusers' arguments, and the consistency function's value."""
        prev, denoised = self._advance(
            model_output, timestep, sample, generator, variance_noise, False
        )
        if return_dict:
            return LCMSchedulerOutput(prev_sample=prev, denoised=denoised)
        return prev, denoised

    def predicted(self, x: Tensor, x0: Tensor, row: list[float], signal: float) -> Tensor:
        """c_skip x + c_out x_0."""
        return (row[INDEX["c_x"]] * x + row[INDEX["c_0"]] * x0) / signal
