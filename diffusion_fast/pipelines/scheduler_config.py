"""``scheduler_config.json`` of diffusers: a schedule and a sampler's settings, read and written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from ..prediction import PREDICTION_TYPES
from ..samplers import SAMPLERS
from ..schedule import DiffusionSchedule

_CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_1": "DPMSolverMultistepScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_3m_diffusers": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "unipc_3": "UniPCMultistepScheduler",
}
# The nearest sampler of ours to a scheduler that we don't have; dpmpp_2m for any other.
_REPLACED = {
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverSDEScheduler": "dpmpp_2m_sde",
    "LCMScheduler": "ddim",
    "TCDScheduler": "ddim",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "DDIMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "LCMScheduler": {
        "timestep_spacing": "leading",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
}
for _name in (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
):
    _DEFAULTS[_name] = {"beta_start": 0.00085, "beta_end": 0.012}

_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_ZERO_SNR = "rescale_betas_zero_snr"
_USED = {
    *_BETAS,
    _ZERO_SNR,
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "final_sigmas_type",
    "clip_sample",
    "clip_sample_range",
    "variance_type",
    "use_karras_sigmas",
    "use_flow_sigmas",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "euler_at_final",
}
# Options that change nothing where the others have the values that are allowed.
_WITHOUT_EFFECT = {
    "skip_prk_steps",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "original_inference_steps",
    "timestep_scaling",
    "noise_sampler_seed",
}
# Options that we don't have, with the values that switch them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lower_order_final": (True,),
    "lambda_min_clipped": (-math.inf, None),
    "predict_x0": (True,),
    "disable_corrector": ([], None),
    "solver_p": (None,),
}
_KARRAS = ("euler", "heun", "unipc", "unipc_3", "dpmpp")  # beginnings of samplers' names
_CLIPPED = ("ddpm", "ddim", "heun")
_FINAL_SIGMA = ("euler", "unipc", "unipc_3", "dpmpp")


@dataclass(frozen=True)
class SchedulerSettings:
    """A noise schedule, and how to sample on it.

    Attributes:
        schedule: the betas.
        sampler: one of :data:`~diffusion_fast.samplers.SAMPLERS`.
        config: the contents of a ``scheduler_config.json`` with the defaults of its class.
    """

    schedule: DiffusionSchedule
    sampler: str
    config: dict[str, Any]

    def table(self, sampler: str | None = None) -> dict[str, Any]:
        """The keywords of :func:`~diffusion_fast.samplers.make_table` that the config decides.

        Args:
            sampler: None for the config's own; of another, the options that both have are kept.

        Raises:
            ValueError: no such sampler.
        """
        sampler = self.sampler if sampler is None else sampler
        checks.one_of("sampler", sampler, SAMPLERS)
        config = self.config
        karras = config.get("use_karras_sigmas") and _is(sampler, _KARRAS)
        if sampler == "ddim":
            first = not config.get("set_alpha_to_one", True)
        else:
            first = config.get("final_sigmas_type") == "sigma_min" and _is(sampler, _FINAL_SIGMA)
        clipped = config.get("clip_sample") and sampler in _CLIPPED
        variance = str(config.get("variance_type"))
        return {
            "sampler": sampler,
            "timestep_spacing": "karras" if karras else config["timestep_spacing"],
            "steps_offset": config.get("steps_offset", 0),
            "final_alpha": "first" if first else "one",
            "prediction_type": config["prediction_type"],
            "variance": "large" if variance.startswith("fixed_large") else "small",
            "clip_sample": float(config.get("clip_sample_range", 1.0)) if clipped else False,
        }


def read_scheduler(config: Mapping[str, Any]) -> SchedulerSettings:
    """The schedule and the sampler of a diffusers ``scheduler_config.json``, read into a dict.

    Warns of a scheduler that we don't have, which is replaced, and of options that we don't have,
    which are left out; each is named.

    Raises:
        ValueError: a scheduler of another kind of model (flow matching, EDM), learned variances,
            an unknown beta schedule, prediction type or spacing.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        checks.fail("_class_name", "the name of a scheduler", repr(name))
    full: dict[str, Any] = {
        "timestep_spacing": "linspace",
        "prediction_type": "epsilon",
        **_DEFAULTS.get(name, {}),
        **config,
    }
    _refuse(name, full)
    sampler = _sampler(name, full)
    for problem in _left_out(sampler, full):
        warnings.warn(f"{name}: {problem}", stacklevel=2)
    return SchedulerSettings(DiffusionSchedule.from_config(full), sampler, full)


def write_scheduler(settings: SchedulerSettings) -> dict[str, Any]:
    """The contents of a ``scheduler_config.json`` that diffusers reads as the same settings.

    diffusers has no corrected third order: ``dpmpp_3m`` is written as its own.
    """
    table, given = settings.table(), settings.config
    sampler = settings.sampler
    config: dict[str, Any] = {
        "_class_name": _CLASSES[sampler],
        **{name: given[name] for name in _BETAS if name in given},
        "prediction_type": table["prediction_type"],
        "timestep_spacing": given["timestep_spacing"],
        "steps_offset": table["steps_offset"],
    }
    if sampler != "heun":
        config[_ZERO_SNR] = bool(given.get(_ZERO_SNR, False))
    if sampler == "ddim":
        config["set_alpha_to_one"] = table["final_alpha"] == "one"
    if sampler == "ddpm":
        config["variance_type"] = f"fixed_{table['variance']}"
    if sampler in _CLIPPED:
        config["clip_sample"] = bool(table["clip_sample"])
        config["clip_sample_range"] = table["clip_sample"] or 1.0
    if _is(sampler, _FINAL_SIGMA):
        config["final_sigmas_type"] = "sigma_min" if table["final_alpha"] == "first" else "zero"
    if _is(sampler, _KARRAS):
        config["use_karras_sigmas"] = table["timestep_spacing"] == "karras"
    if sampler.startswith("dpmpp"):
        sde = sampler.endswith("sde")
        config["algorithm_type"] = "sde-dpmsolver++" if sde else "dpmsolver++"
        config["solver_order"] = int(sampler.removeprefix("dpmpp_")[0])
    if sampler.startswith("unipc"):
        config["solver_order"] = 3 if sampler == "unipc_3" else 2
    return config


def _is(sampler: str, beginnings: tuple[str, ...]) -> bool:
    return sampler != "euler_ancestral" and sampler.startswith(beginnings)


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    known = name in _CLASSES.values() or name in _REPLACED or name in _DEFAULTS
    if not known and not config.keys() & {"beta_schedule", "trained_betas", "beta_start"}:
        supported = ", ".join(dict.fromkeys(_CLASSES.values()))
        raise ValueError(f"_class_name: {name} is not supported (no betas), only {supported}")
    checks.one_of("prediction_type", config["prediction_type"], PREDICTION_TYPES)
    checks.one_of(
        "timestep_spacing", config["timestep_spacing"], ("leading", "trailing", "linspace")
    )
    if config.get("use_flow_sigmas"):
        checks.fail("use_flow_sigmas", "False", True)
    variances = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
    if config.get("variance_type") not in variances:
        checks.fail("variance_type", "a fixed one", repr(config["variance_type"]))


def _sampler(name: str, config: Mapping[str, Any]) -> str:
    order = config.get("solver_order", 2)
    checks.positive_int("solver_order", order)
    if name == "DPMSolverMultistepScheduler":
        algorithm = str(config.get("algorithm_type", "dpmsolver++"))
        wanted = f"{algorithm} of order {order}"
        if algorithm.startswith("sde"):
            exact, sampler = wanted == "sde-dpmsolver++ of order 2", "dpmpp_2m_sde"
        else:
            samplers = {1: "dpmpp_1", 2: "dpmpp_2m", 3: "dpmpp_3m_diffusers"}
            exact = algorithm == "dpmsolver++" and order in samplers
            sampler = samplers.get(order, "dpmpp_2m")
    elif name == "UniPCMultistepScheduler":
        wanted, exact = f"UniPC of order {order}", order in (2, 3)
        sampler = "unipc_3" if order == 3 else "unipc"
    else:
        wanted = name
        exact = name in _CLASSES.values()
        own = {cls: sampler for sampler, cls in _CLASSES.items()}
        sampler = own[name] if exact else _REPLACED.get(name, "dpmpp_2m")
    if not exact:
        message = f"{wanted} is not available here; {sampler} takes its place"
        warnings.warn(message, stacklevel=3)
    return sampler


def _left_out(sampler: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about options without their counterpart here."""
    for name, value in config.items():
        if name in _OFF:
            if value not in _OFF[name]:
                yield f"option {name}={value!r} is not available here and left out"
        elif not (name.startswith("_") or name in _USED or name in _WITHOUT_EFFECT):
            yield f"unknown option {name}={value!r} is left out"
    solver, usual = config.get("solver_type"), {"dpmpp_2m": "midpoint", "unipc": "bh2"}
    for beginning, known in usual.items():
        if sampler.startswith(beginning) and solver in ("heun", "bh1") and solver != known:
            yield f"option solver_type={solver!r} is not available here; {known} takes its place"
    first = config.get("final_sigmas_type") == "sigma_min"
    if config.get("euler_at_final") and first and sampler.startswith("dpmpp"):
        yield "option euler_at_final=True is not available here and left out"
    spacing = config["timestep_spacing"]
    if sampler in ("euler", "heun") and config.get("use_karras_sigmas") and spacing != "linspace":
        yield (
            f"use_karras_sigmas spans the whole schedule here, as with timestep_spacing='linspace',"
            f" not the ends of {spacing!r}"
        )
    if config.get("variance_type") == "fixed_large_log":
        yield "option variance_type='fixed_large_log': fixed_large takes its place"
