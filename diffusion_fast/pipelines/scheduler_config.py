"""``scheduler_config.json`` of diffusers: a schedule and a sampler's settings, read and written."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from ..prediction import PREDICTION_TYPES
from ..samplers import SAMPLERS, of_diffusers
from ..samplers.consistency import TIMESTEP_SCALING, TRAINED_STEPS
from ..samplers.grids import sigma_grid
from ..samplers.names import REFUSED, REFUSED_SETTINGS, options_of
from ..samplers.registry import find
from ..samplers.sampler import DiffusersName
from ..schedule import DiffusionSchedule

_EULER, _SINGLESTEP = "EulerDiscreteScheduler", "DPMSolverSinglestepScheduler"
# What diffusers' classes assume where a file says nothing, if it is not linspace and so on.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        "timestep_spacing": "leading",
        "clip_sample": True,
        "variance_type": "fixed_small",
    },
    "DDIMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
    },
    "UniPCMultistepScheduler": {"solver_order": 2, "solver_type": "bh2", "predict_x0": True},
    _SINGLESTEP: {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": False,
    },
    "PNDMScheduler": {
        "timestep_spacing": "leading",
        "set_alpha_to_one": False,
        "skip_prk_steps": False,
    },
    "DEISMultistepScheduler": {"solver_order": 2},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
}
for _name in ("LCMScheduler", "TCDScheduler"):
    _DEFAULTS[_name] = {
        "timestep_spacing": "leading",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
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
_SIGMAS = ("karras", "exponential", "beta")
_PLACED = tuple(f"use_{name}_sigmas" for name in _SIGMAS)
_QUANTILE, _SHIFT = "thresholding", "use_dynamic_shifting"
_DISTILLED = ("original_inference_steps", "timestep_scaling")
# What each class reads beside the betas, the prediction type, the spacing and its offset.
_READS: dict[str, tuple[str, ...]] = {
    "DDPMScheduler": (
        *(_ZERO_SNR, "variance_type", "clip_sample", "clip_sample_range", _QUANTILE),
    ),
    "DDIMScheduler": (
        *(_ZERO_SNR, "set_alpha_to_one", "clip_sample", "clip_sample_range", _QUANTILE),
    ),
    "DPMSolverMultistepScheduler": (
        *(_ZERO_SNR, "algorithm_type", "solver_order", "solver_type", *_PLACED, "use_lu_lambdas"),
        *("final_sigmas_type", "lower_order_final", "euler_at_final", "lambda_min_clipped"),
        *(_QUANTILE, _SHIFT),
    ),
    "UniPCMultistepScheduler": (
        *(_ZERO_SNR, "solver_order", "solver_type", *_PLACED, "sigma_min", "sigma_max"),
        *("final_sigmas_type", "lower_order_final", "disable_corrector", "predict_x0"),
        *(_QUANTILE, _SHIFT, "shift_terminal", "solver_p"),
    ),
    "EulerDiscreteScheduler": (
        *(_ZERO_SNR, *_PLACED, "sigma_min", "sigma_max", "final_sigmas_type"),
        *("interpolation_type", "timestep_type"),
    ),
    "EulerAncestralDiscreteScheduler": (_ZERO_SNR,),
    "HeunDiscreteScheduler": (*_PLACED, "clip_sample", "clip_sample_range"),
    "KDPM2DiscreteScheduler": _PLACED,
    "KDPM2AncestralDiscreteScheduler": _PLACED,
    "DPMSolverSDEScheduler": _PLACED,
    _SINGLESTEP: (
        *("algorithm_type", "solver_order", "solver_type", *_PLACED),
        *("final_sigmas_type", "lower_order_final", "lambda_min_clipped", _QUANTILE, _SHIFT),
    ),
    "PNDMScheduler": ("set_alpha_to_one", "skip_prk_steps"),
    "LMSDiscreteScheduler": _PLACED,
    "DEISMultistepScheduler": (
        *("solver_order", *_PLACED, "lower_order_final", _QUANTILE, _SHIFT),
    ),
    "SASolverScheduler": (
        *("algorithm_type", "predictor_order", "corrector_order", *_PLACED),
        *("lower_order_final", "lambda_min_clipped", _QUANTILE, "tau_func"),
    ),
    "LCMScheduler": (_ZERO_SNR, "clip_sample", "clip_sample_range", _QUANTILE, *_DISTILLED),
    "TCDScheduler": (_ZERO_SNR, *_DISTILLED),
}
# Those, and what changes nothing where the others have the values that are allowed.
_KNOWN = {
    *(*_BETAS, "prediction_type", "timestep_spacing", "steps_offset"),
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "noise_sampler_seed",
    "use_flow_sigmas",
}.union(*_READS.values())
# Options that we don't have, with the one value that they may have. None is as good as no value.
_FIXED: dict[str, Any] = {
    _QUANTILE: False,
    _SHIFT: False,
    "shift_terminal": None,
    "tau_func": None,
    "timestep_type": "discrete",
    "solver_p": None,
    "original_inference_steps": TRAINED_STEPS,
    "timestep_scaling": TIMESTEP_SCALING,
}
# Names that diffusers' constructors replace by another.
_SAME = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    },
    "UniPCMultistepScheduler": {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
    },
    "DEISMultistepScheduler": {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    },
}


@dataclass(frozen=True)
class SchedulerSettings:
    """A noise schedule, and how to sample on it.

    Attributes:
        schedule: the betas.
        sampler: one of :data:`~diffusion_fast.samplers.SAMPLERS`; None where the scheduler is none
            of them, and a run needs the name of another.
        config: the contents of a ``scheduler_config.json`` with the defaults of its class.
    """

    schedule: DiffusionSchedule
    sampler: str | None
    config: dict[str, Any]

    def table(self, sampler: str | None = None) -> dict[str, Any]:
        """The keywords of :func:`~diffusion_fast.samplers.make_table` that the config decides.

        Args:
            sampler: None for the config's own; of another, the options that both have are kept. A
                name of another program decides the grid by itself.

        Raises:
            ValueError: no such sampler; or none named, and the scheduler's own is none of ours; an
                option that the sampler's class in diffusers would heed, and that we don't have.
        """
        config, sampler = self.config, self.sampler if sampler is None else sampler
        if sampler is None:
            expected = "the name of one, because the model's own scheduler is none of ours"
            checks.fail("sampler", expected, f"None for {_reason(config['_class_name'], config)}")
        entry = find(options_of(sampler, config["timestep_spacing"], SAMPLERS)["sampler"])
        if sampler != entry.name:  # a name that decides the grid
            kept = ("timestep_spacing", "prediction_type")
            return {"sampler": sampler, **{name: config[name] for name in kept}}
        if not entry.diffusers:  # a sampler that diffusers doesn't have takes Euler's settings
            entry = dataclasses.replace(entry, diffusers=(DiffusersName(_EULER),))
        reads = _READS[entry.diffusers[0].scheduler]
        read = {name: config[name] for name in reads if config.get(name) is not None}
        for name in read.keys() & _FIXED.keys():
            if read[name] != _FIXED[name]:
                expected = f"{_FIXED[name]!r} in the model's scheduler for the sampler {entry.name}"
                checks.fail(name, expected, repr(read[name]))
        options: dict[str, Any] = {
            "sampler": entry.name,
            "timestep_spacing": config["timestep_spacing"],
            "steps_offset": config.get("steps_offset", 0),
            "prediction_type": config["prediction_type"],
        }
        placed = [name for name in _SIGMAS if read.get(f"use_{name}_sigmas")]
        if read.get("use_lu_lambdas"):
            placed.append("lu")
        if read.get("interpolation_type") == "log_linear":
            placed.append("log_linear")
        if placed:  # between the ends of the spaced grid, or of the whole schedule
            kind = "sigma_spacing" if entry.grid is sigma_grid else "timestep_spacing"
            options[kind] = placed[0]
            if placed == ["karras"] and entry.diffusers[0].scheduler.startswith("KDPM2"):
                options["whole_timesteps"] = True
        if not read.get("set_alpha_to_one", True) or read.get("final_sigmas_type") == "sigma_min":
            options["final_alpha"] = "first"
        if read.get("variance_type") is not None:
            options["variance"] = _variance(read)
        if read.get("clip_sample"):
            options["clip_sample"] = float(read.get("clip_sample_range", 1.0))
        if read.get("lambda_min_clipped", -math.inf) > -math.inf:
            options["lambda_min"] = read["lambda_min_clipped"]
        same = ("sigma_min", "sigma_max", *entry.options)
        return options | {name: read[name] for name in same if name in read}


def read_scheduler(config: Mapping[str, Any]) -> SchedulerSettings:
    """The schedule and the sampler of a diffusers ``scheduler_config.json``, read into a dict.

    A scheduler that we don't have, or an option of it, is refused when a run asks for it. Warns of
    options that nobody knows, which are left out; each is named.

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
    for key, replaced in _SAME.get(name, {}).items():
        if key in full:
            full[key] = replaced.get(full[key], full[key])
    if name == _SINGLESTEP:  # it has no other
        full |= {"timestep_spacing": "linspace", "steps_offset": 0}
    _refuse(name, full)
    sampler = _sampler(name, full)
    for option in full:
        if not (option.startswith("_") or option in _KNOWN):
            warnings.warn(
                f"{name}: unknown option {option}={full[option]!r} is left out", stacklevel=2
            )
    return SchedulerSettings(DiffusionSchedule.from_config(full), sampler, full)


def write_scheduler(settings: SchedulerSettings) -> dict[str, Any]:
    """The contents of a ``scheduler_config.json`` that diffusers reads as the same settings.

    diffusers has no corrected third order: ``dpmpp_3m`` is written as its own.
    """
    if settings.sampler is None:
        return dict(settings.config)
    given, name = settings.config, find(settings.sampler).diffusers[0]
    kept = (*_BETAS, "prediction_type", "timestep_spacing", *_READS[name.scheduler])
    written = {
        "_class_name": name.scheduler,
        **_DEFAULTS.get(name.scheduler, {}),
        **{key: given[key] for key in kept if key in given},
        "steps_offset": given.get("steps_offset", 0),
        **name.settings,
    }
    if "variance_type" in written:
        written["variance_type"] = f"fixed_{_variance(given)}"
    if name.scheduler == _SINGLESTEP:
        del written["timestep_spacing"], written["steps_offset"]
    if written.get("lambda_min_clipped") == -math.inf:
        del written["lambda_min_clipped"]
    return written


def _variance(config: Mapping[str, Any]) -> str:
    return "large" if config["variance_type"] == "fixed_large" else "small"


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    known = name in _READS or name in _DEFAULTS
    if not known and not config.keys() & {"beta_schedule", "trained_betas", "beta_start"}:
        supported = ", ".join(_READS)
        raise ValueError(f"_class_name: {name} is not supported (no betas), only {supported}")
    checks.one_of("prediction_type", config["prediction_type"], PREDICTION_TYPES)
    checks.one_of(
        "timestep_spacing", config["timestep_spacing"], ("leading", "trailing", "linspace")
    )
    if config.get("use_flow_sigmas"):
        checks.fail("use_flow_sigmas", "False", True)
    checks.one_of(
        "final_sigmas_type", config.get("final_sigmas_type") or "zero", ("zero", "sigma_min")
    )
    # fixed_large_log is NaN in diffusers: the root of a logarithm below 0.
    variances = ("fixed_small", "fixed_small_log", "fixed_large")
    if config.get("variance_type") is not None:
        checks.one_of("variance_type", config["variance_type"], variances)


def _sampler(name: str, config: Mapping[str, Any]) -> str | None:
    checks.positive_int("solver_order", config.get("solver_order", 2))
    found = of_diffusers(name, config)
    if found is None or (name == "PNDMScheduler" and not config["skip_prk_steps"]):
        return None
    return found.name


def _reason(name: str, config: Mapping[str, Any]) -> str:
    """The scheduler that is none of ours, and why."""
    for other, settings, why in REFUSED_SETTINGS:
        if name == other and all(config.get(key) == value for key, value in settings.items()):
            return f"{name} with {', '.join(f'{k}={v}' for k, v in settings.items())}: {why}"
    if name in REFUSED:
        return f"{name}: {REFUSED[name]}"
    known = sorted(
        {
            key
            for one in SAMPLERS.values()
            for n in one.diffusers
            if n.scheduler == name
            for key in n.settings
        }
    )
    return f"{name} with {', '.join(f'{k}={config.get(k)!r}' for k in known)}" if known else name
