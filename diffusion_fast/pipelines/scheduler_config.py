"""``scheduler_config.json`` of diffusers: a schedule and a sampler's settings, read and written."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from ..prediction import PREDICTION_TYPES
from ..samplers import SAMPLERS, of_diffusers
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
# What each class reads beside the betas, the prediction type, the spacing and its offset.
_READS: dict[str, tuple[str, ...]] = {
    "DDPMScheduler": (_ZERO_SNR, "variance_type", "clip_sample", "clip_sample_range"),
    "DDIMScheduler": (_ZERO_SNR, "set_alpha_to_one", "clip_sample", "clip_sample_range"),
    "DPMSolverMultistepScheduler": (
        *(_ZERO_SNR, "algorithm_type", "solver_order", "solver_type", *_PLACED, "use_lu_lambdas"),
        *("final_sigmas_type", "lower_order_final", "euler_at_final", "lambda_min_clipped"),
    ),
    "UniPCMultistepScheduler": (
        *(_ZERO_SNR, "solver_order", "solver_type", *_PLACED, "sigma_min", "sigma_max"),
        *("final_sigmas_type", "lower_order_final", "disable_corrector", "predict_x0"),
    ),
    "EulerDiscreteScheduler": (
        *(_ZERO_SNR, *_PLACED, "sigma_min", "sigma_max", "final_sigmas_type"),
        "interpolation_type",
    ),
    "EulerAncestralDiscreteScheduler": (_ZERO_SNR,),
    "HeunDiscreteScheduler": (*_PLACED, "clip_sample", "clip_sample_range"),
    "KDPM2DiscreteScheduler": _PLACED,
    "KDPM2AncestralDiscreteScheduler": _PLACED,
    "DPMSolverSDEScheduler": _PLACED,
    _SINGLESTEP: (
        *("algorithm_type", "solver_order", "solver_type", *_PLACED),
        *("final_sigmas_type", "lower_order_final", "lambda_min_clipped"),
    ),
    "PNDMScheduler": ("set_alpha_to_one", "skip_prk_steps"),
    "LMSDiscreteScheduler": _PLACED,
    "DEISMultistepScheduler": ("solver_order", *_PLACED, "lower_order_final"),
    "SASolverScheduler": (
        *("algorithm_type", "predictor_order", "corrector_order", *_PLACED),
        *("lower_order_final", "lambda_min_clipped"),
    ),
    "LCMScheduler": (_ZERO_SNR, "clip_sample", "clip_sample_range"),
    "TCDScheduler": (_ZERO_SNR,),
}
_ALL_READ = {*_BETAS, "prediction_type", "timestep_spacing", "steps_offset"}.union(*_READS.values())
# Options that change nothing where the others have the values that are allowed.
_WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "noise_sampler_seed",
    "use_flow_sigmas",
}
# Options that we don't have, with the values that switch them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "tau_func": (None,),
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
    "timestep_type": ("discrete",),
    "solver_p": (None,),
    "original_inference_steps": (50,),
    "timestep_scaling": (10.0, 10),
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
            ValueError: no such sampler; or none named, and the scheduler's own is none of ours.
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
            large = read["variance_type"].startswith("fixed_large")
            options["variance"] = "large" if large else "small"
        if read.get("clip_sample"):
            options["clip_sample"] = float(read.get("clip_sample_range", 1.0))
        if read.get("lambda_min_clipped", -math.inf) > -math.inf:
            options["lambda_min"] = read["lambda_min_clipped"]
        same = ("sigma_min", "sigma_max", *entry.options)
        return options | {name: read[name] for name in same if name in read}


def read_scheduler(config: Mapping[str, Any]) -> SchedulerSettings:
    """The schedule and the sampler of a diffusers ``scheduler_config.json``, read into a dict.

    A scheduler that we don't have is refused when a run asks for it. Warns of options that we
    don't have, which are left out; each is named.

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
    for problem in _left_out(full):
        warnings.warn(f"{name}: {problem}", stacklevel=2)
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
        written["variance_type"] = f"fixed_{settings.table()['variance']}"
    if name.scheduler == _SINGLESTEP:
        del written["timestep_spacing"], written["steps_offset"]
    if written.get("lambda_min_clipped") == -math.inf:
        del written["lambda_min_clipped"]
    return written


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
    variances = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
    if config.get("variance_type") not in variances:
        checks.fail("variance_type", "a fixed one", repr(config["variance_type"]))


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


def _left_out(config: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about options without their counterpart here."""
    for name, value in config.items():
        if name in _OFF:
            if value not in _OFF[name]:
                yield f"option {name}={value!r} is not available here and left out"
        elif not (name.startswith("_") or name in _ALL_READ or name in _WITHOUT_EFFECT):
            yield f"unknown option {name}={value!r} is left out"
    if config.get("variance_type") == "fixed_large_log":
        yield "option variance_type='fixed_large_log': fixed_large takes its place"
