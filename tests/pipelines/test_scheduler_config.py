"""A scheduler's config gives the steps that diffusers' scheduler of that config takes."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from typing import Any

import diffusers
import pytest
from samplers.scheduler_parity import Parity

from diffusion_fast.pipelines.scheduler_config import (
    SchedulerSettings,
    read_scheduler,
    write_scheduler,
)
from diffusion_fast.samplers import SAMPLERS, make_table

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:diffusers",
    "ignore:__array_wrap__:DeprecationWarning:numpy",  # diffusers gives tensors to numpy
)

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}

NOISE = {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
SINGLE = {**BETAS, "lower_order_final": True, "final_sigmas_type": "sigma_min"}
V = "v_prediction"
BH1 = {**SD, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}  # NaN in diffusers without


class ConfigParity(Parity):
    """Ours and theirs from one and the same config."""

    def __init__(self, config: dict[str, Any], steps: int, settings: SchedulerSettings) -> None:
        self.steps, self.strength, self.step_options = steps, None, {}
        self.schedule = settings.schedule
        self.table = make_table(schedule=settings.schedule, steps=steps, **settings.table())
        self.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        table = settings.table()
        first = table.get("final_alpha") == "first" and settings.sampler == "euler"
        self.final_scale = float(self.schedule.alpha_bar[0]) ** 0.5 if first else 1.0


def read_quietly(config: dict[str, Any]) -> SchedulerSettings:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_scheduler(config)


def full_config(name: str, **options: Any) -> dict[str, Any]:
    """The file that diffusers writes: every option of the class, as JSON."""
    scheduler = getattr(diffusers, name)(**options)
    return {"_class_name": name, **json.loads(scheduler.to_json_string())}


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {**SD, "set_alpha_to_one": False, "clip_sample": False}),
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {**BETAS, "timestep_spacing": "trailing", "clip_sample_range": 2.0}),
    (
        "DDIMScheduler",
        {
            **BETAS,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
    ),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {**SD, "clip_sample": False, "variance_type": "fixed_large"}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small_log"}),
    ("EulerDiscreteScheduler", SD),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, "final_sigmas_type": "sigma_min"}),
    (
        "EulerDiscreteScheduler",
        {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    ("EulerAncestralDiscreteScheduler", SD),
    ("EulerAncestralDiscreteScheduler", {**BETAS, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", SD),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 1}),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True, "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {**SD, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {**NOISE, "solver_order": 1}),
    ("DPMSolverMultistepScheduler", {**NOISE, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {**NOISE, "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {**NOISE, "solver_order": 3, "prediction_type": "sample"}),
    ("DPMSolverMultistepScheduler", {**NOISE, "algorithm_type": "sde-dpmsolver"}),
    (
        "DPMSolverMultistepScheduler",
        {**NOISE, "algorithm_type": "sde-dpmsolver", "solver_type": "heun"},
    ),
    ("DPMSolverMultistepScheduler", {"solver_type": "bh2", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -3.0, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {**SD, "use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {**SD, "use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**SD, "use_beta_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "sigma_min": 0.1}),
    ("EulerDiscreteScheduler", {**BETAS, "use_beta_sigmas": True, "sigma_max": 10.0}),
    ("HeunDiscreteScheduler", {**BETAS, "use_beta_sigmas": True, "timestep_spacing": "trailing"}),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 1}),
    ("UniPCMultistepScheduler", {**BH1, "solver_order": 1}),
    ("UniPCMultistepScheduler", {**BH1, "solver_order": 3}),
    ("UniPCMultistepScheduler", BH1),
    ("UniPCMultistepScheduler", {**SD, "disable_corrector": [0, 2]}),
    ("UniPCMultistepScheduler", {**SD, "use_exponential_sigmas": True, "sigma_max": 9.0}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {**SD, "prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {**BETAS, "use_karras_sigmas": True, "clip_sample": True}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    ("KDPM2AncestralDiscreteScheduler", {**SD, "prediction_type": "v_prediction"}),
    ("DPMSolverSinglestepScheduler", BETAS),
    ("DPMSolverSinglestepScheduler", {**BETAS, "solver_type": "heun"}),
    ("DPMSolverSinglestepScheduler", {**BETAS, "solver_order": 3, "use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {**SINGLE, "solver_order": 3}),
    ("DPMSolverSinglestepScheduler", {**SINGLE, "lower_order_final": False}),
    ("DPMSolverSinglestepScheduler", {**SINGLE, "algorithm_type": "dpmsolver"}),
    (
        "DPMSolverSinglestepScheduler",
        {**SINGLE, "algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun"},
    ),
    (
        "DPMSolverSinglestepScheduler",
        {**SINGLE, "algorithm_type": "dpmsolver", "solver_order": 3, "prediction_type": V},
    ),
    ("DPMSolverSinglestepScheduler", {**SINGLE, "algorithm_type": "sde-dpmsolver++"}),
    (
        "DPMSolverSinglestepScheduler",
        {**SINGLE, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    ("DPMSolverSinglestepScheduler", {**SINGLE, "solver_order": 3, "solver_type": "heun"}),
    (
        "DPMSolverSinglestepScheduler",
        {**SINGLE, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    ("LCMScheduler", {}),
    ("LCMScheduler", {"prediction_type": "v_prediction", "clip_sample": True}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
    (
        "PNDMScheduler",
        {**BETAS, "skip_prk_steps": True, "set_alpha_to_one": True, "prediction_type": V},
    ),
    ("LMSDiscreteScheduler", BETAS),
    ("LMSDiscreteScheduler", {**SD, "use_karras_sigmas": True, "prediction_type": V}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {**SD, "solver_order": 3, "use_exponential_sigmas": True}),
    ("DEISMultistepScheduler", {**SD, "solver_order": 1, "algorithm_type": "dpmsolver++"}),
    ("SASolverScheduler", {}),
    ("SASolverScheduler", {**SD, "predictor_order": 3, "corrector_order": 4}),
    ("SASolverScheduler", {**SD, "algorithm_type": "noise_prediction"}),
    ("TCDScheduler", {}),
    ("TCDScheduler", {**BETAS, "prediction_type": "sample"}),
    ("UniPCMultistepScheduler", SD),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 3, "use_karras_sigmas": True}),
    (
        "UniPCMultistepScheduler",
        {"trained_betas": [0.001 * (1 + i / 20) for i in range(400)], "num_train_timesteps": 400},
    ),
]
IDS = [f"{i}-{name.replace('Scheduler', '')}" for i, (name, _) in enumerate(CONFIGS)]


@pytest.mark.parametrize("name, options", CONFIGS, ids=IDS)
@pytest.mark.parametrize("steps", [7, 20])
def test_steps_are_diffusers(name: str, options: dict[str, Any], steps: int) -> None:
    """Timesteps and every state, with only the options that differ from the defaults in the file,
    and with all of them."""
    for config in ({"_class_name": name, **options}, full_config(name, **options)):
        parity = ConfigParity(config, steps, read_quietly(config))
        float32, float64 = parity.errors_against_double()
        assert float64 <= (2e-7 if name == "LCMScheduler" else 1e-9)  # its weights are float32
        assert float32 <= 2e-5


@pytest.mark.parametrize("name, options", CONFIGS, ids=IDS)
def test_written_configs_are_diffusers(name: str, options: dict[str, Any]) -> None:
    settings = read_quietly({"_class_name": name, **options})
    written = json.loads(json.dumps(write_scheduler(settings)))
    again = read_quietly(written)
    assert again.table() == settings.table()
    assert again.schedule.betas.equal(settings.schedule.betas)
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert written.keys() - {"_class_name"} <= accepted.keys()
    float32, float64 = ConfigParity(written, 7, settings).errors_against_double()
    assert float32 <= 2e-5
    assert float64 <= (2e-7 if name == "LCMScheduler" else 1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler_can_be_asked_for(sampler: str) -> None:
    """The schedule, the spacing and the prediction stay; what only one of both has doesn't."""
    config = {**SD, "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
    settings = read_quietly({**config, "prediction_type": "v_prediction"})
    table = settings.table(sampler)
    assert table["sampler"] == sampler
    assert (table["timestep_spacing"], table["steps_offset"]) == ("leading", 1)
    assert table["prediction_type"] == "v_prediction"
    assert table.get("final_alpha", "one") == ("first" if sampler in ("ddim", "pndm") else "one")
    make_table(schedule=settings.schedule, steps=5, **table)
    karras = settings.table("DPM++ 2M Karras")
    assert karras["sampler"] == "DPM++ 2M Karras"
    assert make_table(schedule=settings.schedule, steps=5, **karras).sampler == "dpmpp_2m"
    with pytest.raises(ValueError, match="sampler: expected one of"):
        settings.table("pmls")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("DDIMParallelScheduler", {}, "it goes over all steps at once"),
        ("DPMSolverMultistepInverseScheduler", {}, "it goes from an image to noise"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "the sign of a second",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver+"}, r"='dpmsolver\+'"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "UniPC keeps x_0"),
        ("UniPCMultistepScheduler", {"solver_order": 5}, "solver_order=5"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "Runge-Kutta"),
    ],
)
def test_another_scheduler_is_refused_where_it_is_asked_for(
    name: str, options: dict[str, Any], reason: str
) -> None:
    """The model can still draw, with a sampler of another name, and be written again."""
    config = full_config(name, **BETAS) | {"timestep_spacing": "leading", **options}
    settings = read_scheduler(config)
    with pytest.raises(
        ValueError, match=f"sampler: expected the name of one.* got None for {name}.*{reason}"
    ):
        settings.table()
    table = settings.table("dpmpp_2m")
    assert table["timestep_spacing"] == "leading"
    assert settings.schedule.alphas_cumprod.tolist() == pytest.approx(
        getattr(diffusers, name).from_config(full_config(name, **BETAS)).alphas_cumprod.tolist(),
        rel=1e-5,
    )
    make_table(schedule=settings.schedule, steps=10, **table)
    assert write_scheduler(settings) == settings.config


def test_the_file_of_sd15() -> None:
    """As published, by an old version of diffusers."""
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert read_quietly(config).table() == {
        "sampler": "pndm",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "final_alpha": "first",
    }


def test_what_nobody_knows_is_named() -> None:
    with pytest.warns(UserWarning, match="DDIMScheduler: unknown option sparkle=3 is left out"):
        read_scheduler({"_class_name": "DDIMScheduler", "sparkle": 3})


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("DDIMScheduler", "thresholding", True, "False"),
        ("DDPMScheduler", "thresholding", True, "False"),
        ("DPMSolverMultistepScheduler", "thresholding", True, "False"),
        ("DPMSolverMultistepScheduler", "use_dynamic_shifting", True, "False"),
        ("DPMSolverSinglestepScheduler", "thresholding", True, "False"),
        ("UniPCMultistepScheduler", "thresholding", True, "False"),
        ("UniPCMultistepScheduler", "solver_p", {"_class_name": "DDIMScheduler"}, "None"),
        ("UniPCMultistepScheduler", "shift_terminal", 0.1, "None"),
        ("DEISMultistepScheduler", "thresholding", True, "False"),
        ("SASolverScheduler", "tau_func", "a function", "None"),
        ("SASolverScheduler", "thresholding", True, "False"),
        ("LCMScheduler", "thresholding", True, "False"),
        ("LCMScheduler", "original_inference_steps", 40, "50"),
        ("TCDScheduler", "timestep_scaling", 5.0, "10.0"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous", "'discrete'"),
    ],
)
def test_an_option_that_we_lack_is_refused_where_its_sampler_runs(
    name: str, option: str, value: Any, expected: str
) -> None:
    """Another sampler, whose class has no such option, draws; and the file is written as it was."""
    settings = read_quietly({"_class_name": name, **BETAS, option: value})
    with pytest.raises(ValueError, match=f"{option}: expected {expected} in the model's scheduler"):
        settings.table()
    make_table(schedule=settings.schedule, steps=4, **settings.table("euler_ancestral"))
    assert write_scheduler(settings)[option] == value


def test_thresholding_means_nothing_to_a_class_without_it() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", **BETAS}
    with_it = read_quietly({**config, "thresholding": True})
    assert with_it.table() == read_quietly(config).table()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "_class_name: expected the name of a scheduler, got None"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "is not supported"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler is not"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "prediction_type"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, "timestep_spacing: expected"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma"}, "final_sigmas"),
        (
            {"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.3], "num_train_timesteps": 9},
            "trained_betas: expected num_train_timesteps = 9 values, got 2",
        ),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, "beta_schedule: expected"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type"),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"},
            "variance_type: expected one of fixed_small, .*, got 'fixed_large_log'",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": "2"}, "solver_order"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": -1}, "timesteps: expected"),
    ],
)
def test_what_cannot_be_read_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scheduler(config)


def test_diffusers_infinity_is_read() -> None:
    config = full_config("DPMSolverMultistepScheduler", **SD)
    assert config["lambda_min_clipped"] == -math.inf
    read_quietly(config)
