"""Our samplers as schedulers of diffusers: drop-in, on its own grids, equal to its own to rounding.

    pipe.scheduler = DiffusionFastDPMSolver.from_config(pipe.scheduler.config)

Each one takes the configuration of the diffusers scheduler that it is derived from, and refuses the
settings that it does not have. Differences from diffusers are those of
:mod:`diffusion_fast.samplers.grids`, where diffusers' grid is broken.
"""

import math
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin as SchedulerMixin  # by it diffusers knows its schedulers
from torch import Tensor

from ...samplers import StepTable, grids
from ...samplers.grids import Grid
from ...schedule import DiffusionSchedule
from .table_scheduler import (
    Generators,
    StepOutput,
    Supported,
    TableScheduler,
    in_sigma_form,
    karras,
)

_OFF = (False, None)
_NO_SPACING = {"use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF}


class DiffusionFastDDPM(TableScheduler, diffusers.DDPMScheduler):
    """``DDPMScheduler``: ancestral sampling; variances ``fixed_small`` and ``fixed_large``."""

    __module__ = "diffusion_fast"  # as model_index.json is to name it
    make_grid = staticmethod(grids.ddpm_grid)
    supported: ClassVar[Supported] = {
        "variance_type": ("fixed_small", "fixed_large"),
        "thresholding": _OFF,
    }

    def sampler(self) -> str:
        return "ddpm"

    def table_options(self) -> dict[str, Any]:
        return {"variance": self.config.variance_type.removeprefix("fixed_")}


class DiffusionFastDDIM(TableScheduler, diffusers.DDIMScheduler):
    """``DDIMScheduler``, with eta."""

    __module__ = "diffusion_fast"
    make_grid = staticmethod(grids.ddim_grid)
    supported: ClassVar[Supported] = {"thresholding": _OFF}

    def sampler(self) -> str:
        return "ddim"

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """As the other schedulers' ``step``, with ``eta`` in [0, 1] times the posterior's noise."""
        return self._advance(
            model_output, timestep, sample, eta, generator, variance_noise, return_dict
        )


class DiffusionFastDPMSolver(TableScheduler, diffusers.DPMSolverMultistepScheduler):
    """``DPMSolverMultistepScheduler``: DPM-Solver++ of order 1, 2 or 3, and the SDE of order 2.

    Order 3 is as diffusers writes it (``dpmpp_3m_diffusers``).
    """

    __module__ = "diffusion_fast"
    make_grid = staticmethod(grids.solver_grid)
    noise_dtype = torch.float32
    supported: ClassVar[Supported] = {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2, 1, 3),
        "solver_type": ("midpoint",),
        "thresholding": _OFF,
        **_NO_SPACING,
        "use_lu_lambdas": _OFF,
        "use_flow_sigmas": _OFF,
        "use_dynamic_shifting": _OFF,
        "lambda_min_clipped": (-math.inf,),
        "variance_type": (None,),
    }

    def check_config(self) -> None:
        super().check_config()
        config = self.config
        if self._sde and config.solver_order != 2:
            raise ValueError(
                f"solver_order: expected 2 for sde-dpmsolver++, got {config.solver_order}"
            )
        if config.get("euler_at_final") and config.get("final_sigmas_type") == "sigma_min":
            raise ValueError("euler_at_final: expected False with final_sigmas_type, got True")

    @property
    def _sde(self) -> bool:
        return self.config.get("algorithm_type") == "sde-dpmsolver++"

    def sampler(self) -> str:
        if self._sde:
            return "dpmpp_2m_sde"
        return {1: "dpmpp_1", 2: "dpmpp_2m", 3: "dpmpp_3m_diffusers"}[self.config.solver_order]

    def table_options(self) -> dict[str, Any]:
        return {"lower_order_final": self.config.lower_order_final and len(self._grid) < 15}


class DiffusionFastUniPC(TableScheduler, diffusers.UniPCMultistepScheduler):
    """``UniPCMultistepScheduler`` of order 2 or 3, with ``bh2`` and the corrector."""

    __module__ = "diffusion_fast"
    make_grid = staticmethod(grids.solver_grid)
    supported: ClassVar[Supported] = {
        "solver_order": (2, 3),
        "solver_type": ("bh2",),
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([],),
        "solver_p": (None,),
        "thresholding": _OFF,
        **_NO_SPACING,
        "use_flow_sigmas": _OFF,
        "use_dynamic_shifting": _OFF,
        "sigma_min": (None,),
        "sigma_max": (None,),
        "shift_terminal": (None,),
    }

    def sampler(self) -> str:
        return "unipc" if self.config.solver_order == 2 else "unipc_3"


class _SigmaScheduler(TableScheduler):
    """A state x_0 + sigma epsilon, which the model sees divided by sqrt(1 + sigma^2)."""

    make_grid = staticmethod(grids.sigma_grid)
    timesteps_dtype = torch.float32

    def grid(self, steps: int) -> Grid:
        if not self.config.get("use_karras_sigmas"):
            return super().grid(steps)
        final = "first" if self.config.get("final_sigmas_type") == "sigma_min" else "one"
        spacing, offset = self.config.timestep_spacing, self.config.steps_offset
        grid = grids.sigma_grid(self._schedule, steps, spacing, offset, final)
        limits = self.config.get("sigma_min"), self.config.get("sigma_max")
        return karras(grid, self._schedule, *limits)

    def in_outer_form(self, table: StepTable) -> StepTable:
        start = len(self._grid) - table.steps
        row = np.arange(len(table))
        point, step = start + (row + self.order - 1) // self.order, start + row // self.order
        return in_sigma_form(table, self._grid.signal[point], self._grid.next_signal[step])

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        row = self._row_of(timestep)
        return sample * float(self._grid.signal[self._points()[row]])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples + sigma noise; see the other schedulers' ``add_noise``."""
        signal, sigma = self._levels(timesteps, original_samples)
        return original_samples + sigma / signal * noise


class DiffusionFastEuler(_SigmaScheduler, diffusers.EulerDiscreteScheduler):
    """``EulerDiscreteScheduler``, Karras' spacing included."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        **_NO_SPACING,
    }

    def sampler(self) -> str:
        return "euler"


class DiffusionFastEulerAncestral(_SigmaScheduler, diffusers.EulerAncestralDiscreteScheduler):
    """``EulerAncestralDiscreteScheduler``."""

    __module__ = "diffusion_fast"

    def sampler(self) -> str:
        return "euler_ancestral"


class DiffusionFastHeun(_SigmaScheduler, diffusers.HeunDiscreteScheduler):
    """``HeunDiscreteScheduler``: two model calls for each step but the last."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = _NO_SPACING

    def sampler(self) -> str:
        return "heun"

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """As the other schedulers'. ``num_train_timesteps`` is what diffusers' constructor passes:
        no run begins there, and not every setting allows as many steps."""
        if num_train_timesteps is None:
            return super().set_timesteps(num_inference_steps, device)
        levels = DiffusionSchedule.from_config(self.config).alphas_cumprod.flip(0)
        self.sigmas = ((1 - levels) / levels).sqrt()
        self.num_inference_steps = None

    def _sigmas(self) -> Tensor:
        """[2n]: each but the ends twice, as diffusers keeps them."""
        sigmas = super()._sigmas()
        return torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
