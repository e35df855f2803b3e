"""Runs a sampler's table, and its counterpart in diffusers, with one toy model and one noise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor

from diffusion_fast.ops import sampler_step
from diffusion_fast.samplers import SAMPLERS, StepTable, make_table
from diffusion_fast.samplers.grids import LEAST_ALPHA_BAR
from diffusion_fast.schedule import DiffusionSchedule

SHAPE = (2, 3, 4, 4)
COUNTERPARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_3m_diffusers": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
}
# The samplers on diffusers' grids of every spacing, with one call a step (but Heun's two) and a
# history of x_0: that of epsilon loses digits where sigma is large.
CORE = tuple(
    name
    for name, sampler in SAMPLERS.items()
    if sampler.diffusers
    and (sampler.calls_per_step == 1 or name == "heun")
    and name not in ("lcm", "tcd", "lms", "pndm", "deis_1", "deis_2", "deis_3")
    and "Singlestep" not in sampler.diffusers[0].scheduler
    and sampler.diffusers[0].settings.get("algorithm_type", "++").endswith("++")
)
BETAS = {
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}


def toy_model(x: Tensor, t: float) -> Tensor:
    """A smooth function of the state and of t, with mixing between neighbours.

    As a network with normalisation it barely reacts to rounding in a state of several thousands,
    which a single wild step from sigma = 20000 (cosine betas) reaches.
    """
    u = 4 * torch.tanh(x / 4)
    return torch.sin(0.7 * u + 0.3 * u.roll(1, -1) + 0.01 * t) * 0.8 + 0.1


def schedule_of(kind: str, zero_terminal_snr: bool = False) -> DiffusionSchedule:
    _, start, end = BETAS[kind]
    return DiffusionSchedule(1000, start, end, kind, zero_terminal_snr=zero_terminal_snr)


def has_counterpart(sampler: str, kind: str, steps: int, spacing: str, prediction: str) -> bool:
    """Whether diffusers has the combination and gets it right (see diffusion_fast.samplers.grids).

    It lacks Karras grids for DDPM, DDIM and Euler-ancestral, and x_0 prediction for Heun and
    Euler-ancestral. Its single leading or linspace step of the first five starts at t = 0; with
    cosine betas the first rounded timesteps of a Karras grid coincide.
    """
    single = steps == 1 and spacing != "trailing"
    if sampler in ("ddpm", "ddim"):
        return spacing != "karras" and not single
    if sampler == "euler":
        return not single
    if sampler in ("euler_ancestral", "heun"):
        karras = spacing == "karras" and sampler == "euler_ancestral"
        return not (single or karras or prediction == "sample")
    return not (spacing == "karras" and kind == "cosine")


class Parity:
    """One sampler of ours beside its counterpart, with equal settings.

    Errors are relative to max |x| of each state: the model's inputs, which are in the same
    variance-preserving form on both sides, and the final image.
    """

    def __init__(
        self,
        sampler: str,
        kind: str,
        steps: int,
        spacing: str,
        prediction_type: str,
        config: dict[str, Any] | None = None,
        step_options: dict[str, Any] | None = None,
        zero_terminal_snr: bool = False,
        strength: float | None = None,
        **options: Any,
    ) -> None:
        self.steps, self.strength, self.step_options = steps, strength, step_options or {}
        self.final_scale = 1.0
        self.schedule = schedule_of(kind, zero_terminal_snr)
        self.table = make_table(
            sampler,
            self.schedule,
            steps,
            timestep_spacing=spacing,
            prediction_type=prediction_type,
            strength=strength,
            **options,
        )
        name, fixed = COUNTERPARTS[sampler]
        beta_schedule, start, end = BETAS[kind]
        settings = fixed | {
            "num_train_timesteps": self.schedule.timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": start,
            "beta_end": end,
            "prediction_type": prediction_type,
            "timestep_spacing": "linspace" if spacing == "karras" else spacing,
        }
        if spacing == "karras":
            settings["use_karras_sigmas"] = True
        if zero_terminal_snr:
            settings["rescale_betas_zero_snr"] = True
        self.scheduler = getattr(diffusers, name)(**settings | (config or {}))

    def float32_error(self) -> float:
        """Both sides in float32, each with tables of its own."""
        theirs = self._run_theirs(torch.float32)
        return worst_error(self._run_ours(torch.float32), theirs)

    def errors_against_double(self) -> tuple[float, float]:
        """Of ours in float32 and in float64, against theirs in float64 on one alpha-bar table.

        Theirs in float32 is no judge of the sigma family: x_0 + sigma epsilon with sigma = 157
        (linear betas) or 20000 (cosine) loses that many units of the last place.
        """
        with in_double(self.scheduler, self.schedule):
            theirs = self._run_theirs(torch.float64)
        return (
            worst_error(self._run_ours(torch.float32), theirs),
            worst_error(self._run_ours(torch.float64), theirs),
        )

    def _noise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.steps)
        x_T, image = torch.randn((2, *SHAPE), generator=generator).to(dtype)
        return x_T, image

    def _run_ours(self, dtype: torch.dtype) -> list[Tensor]:
        x_T, image = self._noise(dtype)
        if self.strength is None:
            x = x_T * self.table.initial_scale
        else:
            x = self.table.signal * image + self.table.noise * x_T
        return run_table(self.table, toy_model, x, seed=7)

    def _run_theirs(self, dtype: torch.dtype) -> list[Tensor]:
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps)
        start = self.steps - min(int(self.steps * (self.strength or 1)), self.steps)
        start *= scheduler.order
        timesteps = scheduler.timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x_T, image = self._noise(dtype)
        if self.strength is None:
            x = x_T * scheduler.init_noise_sigma
        else:
            x = scheduler.add_noise(image, x_T, timesteps[:1])
        options = dict(self.step_options)
        if "generator" in scheduler.step.__code__.co_varnames:
            options["generator"] = torch.Generator().manual_seed(7)
        trace = []
        for t in timesteps:
            model_input = scheduler.scale_model_input(x, t)
            trace.append(model_input.clone())
            x = scheduler.step(toy_model(model_input, t.item()), t, x, **options).prev_sample
        ours = self.table.timesteps.tolist()
        assert ours == pytest.approx(timesteps.tolist(), rel=1e-6, abs=2e-3)  # theirs are float32
        return [*trace, x * self.final_scale]


def run_table(
    table: StepTable,
    model: Callable[[Tensor, float], Tensor],
    x: Tensor,
    seed: int = 0,
    buffers: float = 0.0,
) -> list[Tensor]:
    """The state before each model call and at the end.

    ``buffers`` fills what is kept at the start; no result may depend on it.
    """
    x = x.clone()
    kept = {name: torch.full_like(x, buffers) for name in table.kept}
    generator = torch.Generator().manual_seed(seed)
    trace, draws = [x.clone()], table.draws.tolist()
    for i, t in enumerate(table.timesteps.tolist()):
        noise = torch.randn(x.shape, generator=generator).to(x.dtype) if draws[i] else None
        sampler_step(x, model(x, t), table.rows, i, noise=noise, **kept)
        trace.append(x.clone())
    return trace


def worst_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert all(error == error for error in errors), f"NaN in {errors}"
    return max(errors)


class _Doubled:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def in_double(scheduler: Any, schedule: DiffusionSchedule) -> Iterator[None]:
    """Lets a diffusers scheduler calculate in float64, which it casts to float32 here and there."""
    scheduler.alphas_cumprod = schedule.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        if not scheduler.config.set_alpha_to_one:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    elif schedule.alpha_bar[-1] == 0 and "DDPM" not in type(scheduler).__name__:
        scheduler.alphas_cumprod[-1] = LEAST_ALPHA_BAR
    module = sys.modules[type(scheduler).__module__]
    replaced = {name: _Doubled(getattr(module, name)) for name in ("torch", "np")}
    if hasattr(module, "randn_tensor"):
        replaced["randn_tensor"] = lambda shape, generator, dtype, **_: torch.randn(
            shape, generator=generator
        ).to(dtype)
    with mock.patch.multiple(module, **replaced):
        yield
