"""Schedulers of diffusers on grids in log-SNR: DPM-Solver, UniPC, DEIS and SA-Solver.

The refusals of :mod:`.schedulers` hold for them too.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from ...ops import checks
from ...samplers import SamplerOptions
from .table_scheduler import (
    Deterministic,
    Device,
    Drawing,
    Generators,
    Output,
    Supported,
    TableScheduler,
)

_OFF = (False, None)
_NO_FLOW = {"use_flow_sigmas": _OFF, "use_dynamic_shifting": _OFF}


class _Solver(TableScheduler):
    """Of grids in log-SNR."""

    returns_x0 = False

    def grid_options(self) -> SamplerOptions:
        lowest = self.config.get("lambda_min_clipped", -math.inf)
        return super().grid_options().replace(lambda_min=None if lowest == -math.inf else lowest)

    def elsewhere(self, t: float) -> int:
        """A time below all timesteps means the last step, as in diffusers."""
        values = self._ready().values
        return len(values) - 1 if 0 <= t < values[-1] else super().elsewhere(t)


class _DPMSolver(_Solver):
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


class DiffusionFastDPMSolver(_DPMSolver, diffusers.DPMSolverMultistepScheduler):
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
        options = super().grid_options()
        return (
            options.replace(timestep_spacing="lu") if self.config.get("use_lu_lambdas") else options
        )

    def row_options(self, start: int) -> dict[str, Any]:
        config = self.config
        return {
            "lower_order_final": config.lower_order_final,
            "euler_at_final": config.euler_at_final,
        }

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


class DiffusionFastDPMSolverSinglestep(Drawing, _DPMSolver, diffusers.DPMSolverSinglestepScheduler):
    """``DPMSolverSinglestepScheduler`` of order 1, 2 or 3; the SDE's third has no ``heun``."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "solver_order": (2, 1, 3),
        "solver_type": ("midpoint", "heun"),
        "thresholding": (False,),
        **_NO_FLOW,
        "variance_type": (None,),
    }

    def check_config(self) -> None:
        super().check_config()
        config = self.config
        third = config.algorithm_type == "sde-dpmsolver++" and config.solver_order == 3
        if third and config.solver_type == "heun":
            checks.fail("solver_order", "1 or 2 for sde-dpmsolver++ with heun", 3)

    def row_options(self, start: int) -> dict[str, Any]:
        return {"lower_order_final": self.config.lower_order_final}


class DiffusionFastUniPC(Deterministic, _Solver, diffusers.UniPCMultistepScheduler):
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


class DiffusionFastDEIS(Deterministic, _Solver, diffusers.DEISMultistepScheduler):
    """``DEISMultistepScheduler`` of order 1, 2 or 3."""

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "solver_order": (2, 1, 3),
        "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
        "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
        "thresholding": (False,),
        **_NO_FLOW,
    }

    def row_options(self, start: int) -> dict[str, Any]:
        return {"lower_order_final": self.config.lower_order_final}

    def set_timesteps(
        self, num_inference_steps: int, device: Device = None, mu: float | None = None
    ) -> None:
        """As the other schedulers'; ``mu`` is for flow matching: None."""
        if mu is not None:
            checks.fail("mu", "None (it is for flow matching)", mu)
        self._choose(num_inference_steps, device)


class DiffusionFastSASolver(Drawing, _Solver, diffusers.SASolverScheduler):
    """``SASolverScheduler`` of orders 1 to 4, its own tau: 1 where 200 <= t <= 800.

    Noise is drawn even where tau is 0.
    """

    __module__ = "diffusion_fast"
    supported: ClassVar[Supported] = {
        "algorithm_type": ("data_prediction", "noise_prediction"),
        "predictor_order": (2, 1, 3, 4),
        "corrector_order": (2, 1, 3, 4),
        "tau_func": (None,),
        "thresholding": (False,),
        "use_flow_sigmas": _OFF,
        "variance_type": (None,),
    }

    def row_options(self, start: int) -> dict[str, Any]:
        names = ("predictor_order", "corrector_order", "lower_order_final")
        return {name: self.config[name] for name in names}
