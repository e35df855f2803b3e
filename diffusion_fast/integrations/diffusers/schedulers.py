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
``solver_order=3`` with sde-dpmsolver++         diffusers' formula has a wrong sign (in singlestep
or sde-dpmsolver; thresholding with dpmsolver   with heun alone; and none for sde-dpmsolver); its
                                                history holds epsilon
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
from diffusers import SchedulerMixin as SchedulerMixin  # by it diffusers knows its schedulers
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from ...ops import checks
from ...samplers.consistency import TIMESTEP_SCALING, TRAINED_STEPS
from ...samplers.grids import Grid, ddim_steps
from ...samplers.table import INDEX
from .table_scheduler import (
    Deterministic,
    Device,
    Drawing,
    Generators,
    Output,
    Rows,
    StepOutput,
    Supported,
    TableScheduler,
)


class DiffusionFastDDPM(Drawing, diffusers.DDPMScheduler):
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
        plan.step.append(len(plan.values))
        plan.values.append(t)
        return len(plan.values) - 1


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

    def predicted(
        self, x: Tensor, x0: Tensor, m: Tensor, row: list[float], signal: float
    ) -> Tensor:
        """c_skip x + c_out x_0."""
        return (row[INDEX["c_x"]] * x + row[INDEX["c_0"]] * x0) / signal


class DiffusionFastTCD(TableScheduler, diffusers.TCDScheduler):
    """``TCDScheduler``: trajectory consistency, on some of the 50 timesteps of distillation."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {"original_inference_steps": (TRAINED_STEPS,)}
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

        ``original_inference_steps`` is None and ``strength`` 1: image-to-image begins within the
        timesteps.
        """
        if original_inference_steps is not None:
            checks.fail("original_inference_steps", "None", original_inference_steps)
        if strength != 1:
            checks.fail("strength", "1", strength)
        self._choose(num_inference_steps, device, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
    ) -> TCDSchedulerOutput | tuple[Tensor, ...]:
        """The next state, with diffusers' arguments, and what it was before noise was added."""
        noise = generator, variance_noise
        prev, noised = self._advance(model_output, timestep, sample, *noise, False, eta=eta)
        if return_dict:
            return TCDSchedulerOutput(prev_sample=prev, pred_noised_sample=noised)
        return prev, noised

    def predicted(
        self, x: Tensor, x0: Tensor, m: Tensor, row: list[float], signal: float
    ) -> Tensor:
        """A x_0 + S epsilon at the level below the next one."""
        total = row[INDEX["c_x"]] * x + row[INDEX["c_0"]] * x0 + row[INDEX["c_m"]] * m
        return total / math.sqrt(1 - row[INDEX["s"]] ** 2)


class DiffusionFastPNDM(Deterministic, diffusers.PNDMScheduler):
    """``PNDMScheduler`` with ``skip_prk_steps``: PLMS, which takes its first step twice.

    A run that begins within the timesteps takes each step once.
    """

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "skip_prk_steps": (True,),
        "prediction_type": ("epsilon", "v_prediction"),
    }
    returns_x0 = False

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
        if self.step_index is None and self.begin_index == 1:  # the repeated call of another run
            self.set_begin_index(2)
            return StepOutput(sample, sample) if return_dict else (sample,)
        return self._advance(model_output, timestep, sample, generator, variance_noise, return_dict)

    def _made(self, grid: Grid, steps: int, start: int, options: dict[str, Any]) -> Rows:
        table, rows = super()._made(grid, steps, start, options)
        if start and len(rows) > 1:  # without the repeated call
            kept = [0, *range(2, len(rows))]
            table = table.only(kept)
            rows = [rows[i] for i in kept]
        return table, rows
