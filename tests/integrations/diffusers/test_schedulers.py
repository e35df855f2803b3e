"""Our schedulers beside those of diffusers, step by step and in its pipelines."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import tiny_pipelines as tiny
import torch
from numerics import error
from torch import Tensor

import diffusion_fast
from diffusion_fast import integrations
from diffusion_fast.integrations import diffusers as ours

CLOSE = 2e-6  # of max |x|, float32, per step
PICTURES = 1e-4  # of max |picture|
SPACINGS = ("leading", "trailing", "linspace")

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning:diffusers",
)

PLMS = {"skip_prk_steps": True}
SEED = {"noise_sampler_seed": 3}
# Name of ours, of diffusers', settings.
SCHEDULERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("DDPM", "DDPMScheduler", {}),
    ("DDPM", "DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDIM", "DDIMScheduler", {}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolver", "DPMSolverMultistepScheduler", {"lower_order_final": False}),
    (
        "DPMSolver",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    ),
    (
        "DPMSolver",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    ("UniPC", "UniPCMultistepScheduler", {}),
    ("UniPC", "UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPC", "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ("Euler", "EulerDiscreteScheduler", {}),
    ("Euler", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    (
        "Euler",
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 8.0},
    ),
    ("Euler", "EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("Euler", "EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerAncestral", "EulerAncestralDiscreteScheduler", {}),
    ("Heun", "HeunDiscreteScheduler", {}),
    ("Heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
)
DEFAULTS = [(name, other) for name, other, settings in SCHEDULERS if not settings]
# The others, tried in fewer ways.
MORE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("KDPM2", "KDPM2DiscreteScheduler", {}),
    ("KDPM2Ancestral", "KDPM2AncestralDiscreteScheduler", {}),
    ("LMS", "LMSDiscreteScheduler", {}),
    ("LMS", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverSDE", "DPMSolverSDEScheduler", SEED),
    ("DPMSolverSDE", "DPMSolverSDEScheduler", {**SEED, "use_karras_sigmas": True}),
    ("PNDM", "PNDMScheduler", PLMS),
    (
        "PNDM",
        "PNDMScheduler",
        {**PLMS, "set_alpha_to_one": True, "prediction_type": "v_prediction"},
    ),
    ("DEIS", "DEISMultistepScheduler", {}),
    ("DEIS", "DEISMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    ("SASolver", "SASolverScheduler", {}),
    ("SASolver", "SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}),
    ("SASolver", "SASolverScheduler", {"algorithm_type": "noise_prediction"}),
    ("DPMSolverSinglestep", "DPMSolverSinglestepScheduler", {}),
    (
        "DPMSolverSinglestep",
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "lower_order_final": True},
    ),
    (
        "DPMSolverSinglestep",
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    ),
    ("TCD", "TCDScheduler", {}),
)
MORE_DEFAULTS = [(name, other) for name, other, settings in MORE if settings in ({}, PLMS, SEED)]
Scheduler = Any


def pair(name: str, other: str, **settings: Any) -> tuple[Scheduler, Scheduler]:
    """Ours, made of the config of diffusers', and diffusers'."""
    config = {**tiny.STABLE_DIFFUSION, **PLMS, **SEED, **settings}
    keys = getattr(diffusers, other)().config
    theirs = getattr(diffusers, other)(**{k: v for k, v in config.items() if k in keys})
    return getattr(ours, f"DiffusionFast{name}").from_config(theirs.config), theirs


def model(x: Tensor, t: float) -> Tensor:
    u = torch.tanh(x / 2)
    return torch.sin(u + 0.3 * u.roll(1, -1) + 0.01 * t)


def run(scheduler: Scheduler, steps: int, start: int = 0, **options: Any) -> list[Tensor]:
    """All inputs of the model, and the last state, with the same noise for every scheduler."""
    generator = torch.Generator().manual_seed(0)
    image, x = torch.randn(2, 2, 3, 4, 4, generator=generator)
    scheduler.set_timesteps(steps)
    begin = start * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if start:
        x = scheduler.add_noise(image, x, timesteps[:1].repeat(2))
    else:
        x = x * scheduler.init_noise_sigma
    if "generator" in type(scheduler).step.__code__.co_varnames:
        options["generator"] = generator
    trace = []
    for t in timesteps:
        inputs = scheduler.scale_model_input(x, t)
        output = scheduler.step(model(inputs, float(t)), t, x, **options)
        x = output.prev_sample
        trace += [inputs, x]
        if getattr(output, "pred_original_sample", None) is not None:
            trace.append(output.pred_original_sample)
    return trace


def worst(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return max(error(a, b) for a, b in zip(mine, theirs, strict=True))


CASES = [
    (*one, spacing, steps, start)
    for one in SCHEDULERS
    for spacing in SPACINGS
    for steps in (10, 16)
    for start in (0, 4)
]
CASES += [
    (*one, *how)
    for one in MORE
    for how in (("leading", 10, 0), ("trailing", 16, 4), ("linspace", 16, 0))
    if not (one[0] in ("LMS", "PNDM") and how[2])  # see below
]


@pytest.mark.parametrize("name, other, settings, spacing, steps, start", CASES)
def test_steps_are_diffusers(
    name: str, other: str, settings: dict[str, Any], spacing: str, steps: int, start: int
) -> None:
    mine, theirs = pair(name, other, timestep_spacing=spacing, **settings)
    result, expected = run(mine, steps, start), run(theirs, steps, start)
    if len(expected) < len(result):  # theirs has no pred_original_sample
        result = [x for i, x in enumerate(result) if i % 3 < 2]
    assert worst(result, expected) <= allowed(name)
    assert mine.timesteps.dtype == theirs.timesteps.dtype
    assert error(mine.timesteps, theirs.timesteps) <= 1e-6
    if hasattr(theirs, "sigmas"):
        assert error(mine.sigmas, theirs.sigmas) <= 1e-6
    assert float(mine.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert mine.order == theirs.order
    assert len(mine) == len(theirs)


@pytest.mark.parametrize(
    "name, other", [("LMS", "LMSDiscreteScheduler"), ("PNDM", "PNDMScheduler")]
)
def test_a_run_from_the_middle_has_no_history_there(name: str, other: str) -> None:
    """diffusers' weighs calls that were not made (LMS), or repeats another step's (PNDM); ours goes
    on as a run does that begins: for a model of one noise it ends at the image."""
    mine, _ = pair(name, other)
    mine.set_timesteps(12)
    for begin in (1, 2, 5):
        mine.set_timesteps(12)
        mine.set_begin_index(begin)
        image, z = torch.randn(2, 1, 3, 4, 4)
        x = mine.add_noise(image, z, mine.timesteps[begin : begin + 1])
        for t in mine.timesteps[begin:]:
            mine.scale_model_input(x, t)
            x = mine.step(z, t, x).prev_sample
        last = float(mine.alphas_cumprod[0]) if name == "PNDM" else 1.0
        assert error(x, last**0.5 * image + (1 - last) ** 0.5 * z) <= 1e-5


def allowed(name: str) -> float:
    """SA-Solver's integrals, the tree's noise, DPM2's levels: diffusers has them in float32."""
    return 2e-5 if name in ("DPMSolverSDE", "KDPM2", "KDPM2Ancestral", "SASolver") else CLOSE


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name, other", DEFAULTS + MORE_DEFAULTS)
def test_prediction_types(name: str, other: str, prediction_type: str) -> None:
    lacking = ("EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral", "DPMSolverSDE", "PNDM")
    if prediction_type == "sample" and name in lacking:
        pytest.skip("diffusers has no such thing")
    mine, theirs = pair(name, other, prediction_type=prediction_type)
    results = run(mine, 8), run(theirs, 8)
    without = [one for i, one in enumerate(results[0]) if i % 3 < 2]  # no pred_original_sample
    result = results[0] if len(results[0]) == len(results[1]) else without
    assert worst(result, results[1]) <= allowed(name)


@pytest.mark.parametrize("name, other", [("DDIM", "DDIMScheduler"), ("Euler", DEFAULTS[4][1])])
def test_zero_terminal_snr(name: str, other: str) -> None:
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    mine, theirs = pair(name, other, prediction_type="v_prediction", **settings)
    allowed = 5e-6 if name == "DDIM" else 1e-4  # x_0 + 4096 epsilon, in float32
    assert worst(run(mine, 8), run(theirs, 8)) <= allowed


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_eta(eta: float) -> None:
    mine, theirs = pair("DDIM", "DDIMScheduler")
    assert worst(run(mine, 9, eta=eta), run(theirs, 9, eta=eta)) <= CLOSE


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "Heun"])
def test_clipping(name: str) -> None:
    other = dict(DEFAULTS)[name]
    mine, theirs = pair(name, other, clip_sample=True, clip_sample_range=0.9)
    assert worst(run(mine, 9), run(theirs, 9)) <= 1e-4  # the clipped x_0 is divided by little


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, other", DEFAULTS)
def test_dtypes(name: str, other: str, dtype: torch.dtype) -> None:
    mine, _ = pair(name, other)
    mine.set_timesteps(5)
    t = mine.timesteps[0]
    x, m = torch.randn(2, 1, 3, 4, 4)
    exact = mine.step(m.double(), t, x.double(), variance_noise=x.double()).prev_sample
    mine.set_timesteps(5)
    before = x.to(dtype)
    output = mine.step(m.to(dtype), mine.timesteps[0], before, variance_noise=x)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert torch.equal(before, x.to(dtype))  # the state is left as it is
    assert error(output.prev_sample, exact) <= 4 * torch.finfo(dtype).eps + 1e-7


@pytest.mark.parametrize(
    "kind, task, name, other",
    [
        *itertools.chain.from_iterable(
            [(kind, task, *one) for one in DEFAULTS]
            for kind in ("sd", "sdxl")
            for task in ("", "Img2Img", "Inpaint")
        ),
        *(("sd", "", *one) for one in MORE_DEFAULTS if one[0] != "DPMSolverSDE"),
    ],
)
def test_pictures_are_the_same(kind: str, task: str, name: str, other: str) -> None:
    pipe = tiny.pipeline(kind, task)
    pictures = []
    for scheduler in reversed(pair(name, other)):
        pipe.scheduler = scheduler
        pictures.append(tiny.picture(pipe, num_inference_steps=6))
    assert error(pictures[1], pictures[0]) <= PICTURES


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    "name, other, settings",
    [*SCHEDULERS, *(one for one in MORE if one[0] != "DPMSolverSDE")],  # its path is the host's
)
def test_a_step_reads_nothing_on_the_host(
    name: str, other: str, settings: dict[str, Any], start: int
) -> None:
    """On the meta device there is nothing to read: whoever tries raises."""
    mine, _ = pair(name, other, **settings)
    mine.set_timesteps(8, "meta")
    begin = start * mine.order
    mine.set_begin_index(begin)
    timesteps = mine.timesteps[begin:]
    x = torch.empty(1, 3, 4, 4, device="meta")
    x = mine.add_noise(x, x, timesteps[:1])
    for t in timesteps:
        m = torch.sin(mine.scale_model_input(x, t))
        x = mine.step(m, t, x).prev_sample
    assert x.shape == (1, 3, 4, 4)
    assert mine.step_index == len(mine.timesteps)


@pytest.mark.parametrize("name, other", DEFAULTS)
def test_timesteps_on_another_device_are_counted(name: str, other: str) -> None:
    """An unknown tensor that can't be read without waiting (here: of meta) is taken in turn."""
    mine, _ = pair(name, other)
    expected = run(mine, 5)
    mine.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    _, x = torch.randn(2, 2, 3, 4, 4, generator=generator)
    x = x * mine.init_noise_sigma
    for t in mine.timesteps.tolist():
        unknown = torch.empty((), device="meta")
        m = model(mine.scale_model_input(x, unknown), t)
        x = mine.step(m, unknown, x, generator=generator).prev_sample
    assert torch.equal(x, expected[-2])
    with pytest.raises(ValueError, match="timestep: expected at most"):
        mine.step(x, unknown, x)


@pytest.mark.parametrize("kind", ["number", "cpu", "element"])
@pytest.mark.parametrize("name, other", DEFAULTS)
def test_steps_out_of_order(name: str, other: str, kind: str) -> None:
    """Where a step depends on no other one, any order will do; elsewhere it raises."""
    mine, theirs = pair(name, other)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(10)
    x, m = torch.randn(2, 1, 3, 4, 4)

    def step(i: int) -> Tensor:
        t = mine.timesteps[i]
        t = {"number": t.item(), "cpu": t.clone(), "element": t}[kind]
        return mine.step(m, t, x, variance_noise=x).prev_sample

    if name in ("DDPM", "DDIM"):
        for i in (7, 2, 2, 9, 0):
            t = theirs.timesteps[i]
            expected = theirs.step(m, t, x)
            if name == "DDIM":
                assert error(step(i), expected.prev_sample) <= CLOSE
            assert error(mine.step(m, t, x).pred_original_sample, expected[1]) <= CLOSE
    elif name in ("Euler", "EulerAncestral"):
        assert torch.equal(step(3), step(3))
        assert not torch.equal(step(3), step(4))
    else:
        step(4)  # it may begin anywhere
        with pytest.raises(ValueError, match="timestep: expected the next of timesteps"):
            step(8)
    with pytest.raises(ValueError, match="timestep: expected"):
        mine.step(m, 12345, x)


@pytest.mark.parametrize("name, other", DEFAULTS)
def test_before_set_timesteps(name: str, other: str) -> None:
    """diffusers' classes that step then go through all timesteps; the others refuse."""
    mine, theirs = pair(name, other)
    assert mine.timesteps.tolist() == theirs.timesteps.tolist()
    x = torch.randn(1, 3, 4, 4)
    if name in ("DDIM", "DPMSolver", "UniPC"):
        with pytest.raises(ValueError, match="expected a call of set_timesteps"):
            mine.step(x, 1, x)
    else:
        for i in (0, 1, len(mine.timesteps) - 1) if mine.order == 1 else (0, 1):
            steps = []
            for scheduler in (mine, theirs):
                t = scheduler.timesteps[i]
                scaled = scheduler.scale_model_input(x, t)
                noise = {"generator": torch.Generator().manual_seed(0)} if name != "Heun" else {}
                steps.append(scheduler.step(0.3 * x, t, scaled, **noise).prev_sample)
                if hasattr(scheduler, "is_scale_input_called"):
                    theirs._step_index = None
            assert error(*steps) <= 1e-4
    with pytest.raises(ValueError, match="num_inference_steps: expected an integer"):
        mine.set_timesteps(0)
    with pytest.raises(ValueError, match=r"num_inference_steps: expected an integer in .1, 1000."):
        mine.set_timesteps(1001)
    mine.set_timesteps(numpy.int64(3))
    assert len(mine.timesteps) == (5 if name == "Heun" else 3)


GRIDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("DDPM", "DDPMScheduler", {"timesteps": [900, 500, 100, 20]}),
    ("DPMSolver", DEFAULTS[2][1], {"timesteps": [900, 500, 100, 20]}),
    ("Euler", DEFAULTS[4][1], {"timesteps": [900.0, 500.5, 100.0, 20.0]}),
    ("Euler", DEFAULTS[4][1], {"sigmas": [10.0, 3.0, 1.0, 0.1, 0.0]}),
    ("Heun", DEFAULTS[6][1], {"timesteps": [900.0, 500.5, 100.0, 20.0]}),
)


@pytest.mark.parametrize("name, other, grid", GRIDS)
def test_grids_of_the_callers(name: str, other: str, grid: dict[str, Any]) -> None:
    mine, theirs = pair(name, other)
    results = []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(**grid)
        scheduler.set_timesteps = lambda steps: None  # run's own
        results.append(run(scheduler, 4)[-2 if name != "DPMSolver" or scheduler is mine else -1])
    assert mine.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    assert error(*results) <= 5e-6


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"timesteps": [10, 20]}, "timesteps: expected at least 1 decreasing numbers in .0, 999."),
        ({"timesteps": [1000, 20]}, "timesteps: expected"),
        ({"timesteps": [10, -1]}, "timesteps: expected"),
        ({"timesteps": []}, "timesteps: expected"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas: expected at least 2 decreasing numbers"),
        ({"sigmas": [float("nan"), 0.0]}, "sigmas: expected"),
        ({"sigmas": [1.0]}, "sigmas: expected"),
        ({"timesteps": [10], "sigmas": [1.0, 0.0]}, "set_timesteps: expected exactly one"),
        ({}, "set_timesteps: expected exactly one of num_inference_steps or timesteps or sigmas"),
    ],
)
def test_grids_that_cannot_be(grid: dict[str, Any], message: str) -> None:
    mine, _ = pair("Euler", DEFAULTS[4][1])
    with pytest.raises(ValueError, match=message):
        mine.set_timesteps(**grid)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "name, other",
    [(name, other) for name, other in DEFAULTS if name in ("DDPM", "DDIM", "DPMSolver", "UniPC")],
)
def test_thresholding(name: str, other: str, prediction_type: str) -> None:
    settings = {"thresholding": True, "sample_max_value": 1.2, "dynamic_thresholding_ratio": 0.9}
    mine, theirs = pair(name, other, prediction_type=prediction_type, **settings)
    last = -1 if name in ("DPMSolver", "UniPC") else -2
    assert error(run(mine, 8)[-2], run(theirs, 8)[last]) <= 1e-4  # as for clipping


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_churn(prediction_type: str) -> None:
    mine, theirs = pair("Euler", DEFAULTS[4][1], prediction_type=prediction_type)
    options = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 8.0, "s_noise": 1.1}
    assert worst(run(mine, 9, **options), run(theirs, 9, **options)) <= CLOSE


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_arguments_of_ddim_by_position(prediction_type: str) -> None:
    """Any timestep, and epsilon from the clipped x_0."""
    mine, theirs = pair("DDIM", "DDIMScheduler", clip_sample=True, prediction_type=prediction_type)
    x, m = torch.randn(2, 1, 3, 4, 4)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(10)
    for t in (777, 3, int(mine.timesteps[4])):
        for clipped in (False, True):
            call = (m, t, x, 0.5, clipped, None, x, False)
            for a, b in zip(mine.step(*call), theirs.step(*call), strict=True):
                assert error(a, b) <= 5e-6


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize(
    "settings", [{}, {"prediction_type": "v_prediction"}, {"clip_sample": True}]
)
def test_lcm(settings: dict[str, Any], steps: int) -> None:
    mine, theirs = pair("LCM", "LCMScheduler", **settings)
    traces = []
    for scheduler in (mine, theirs):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 4, 4, generator=generator)
        scheduler.set_timesteps(steps)
        trace = []
        for t in scheduler.timesteps:
            output = scheduler.step(model(x, float(t)), t, x, generator)
            x = output.prev_sample
            trace += [x, output.denoised]
        traces.append(trace)
    assert mine.timesteps.tolist() == theirs.timesteps.tolist()
    assert worst(*traces) <= 1e-5
    for options, message in (
        ({"original_inference_steps": 20}, "original"),
        ({"strength": 0.5}, "s"),
    ):
        with pytest.raises(ValueError, match=message):
            mine.set_timesteps(steps, **options)


@pytest.mark.parametrize("start", [0, 4])
def test_correctors_are_counted_from_the_first_timestep(start: int) -> None:
    mine, theirs = pair("UniPC", DEFAULTS[3][1], disable_corrector=[0, 5, 6])
    trace = [x for i, x in enumerate(run(mine, 10, start)) if i % 3 < 2]
    assert worst(trace, run(theirs, 10, start)) <= CLOSE


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_latents_that_a_callback_rewrites(factor: float) -> None:
    results = []
    for scheduler in pair("Heun", DEFAULTS[6][1]):
        scheduler.set_timesteps(5)
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x = factor * scheduler.step(scheduler.scale_model_input(x, t) / 2, t, x).prev_sample
        results.append(x)
    assert error(*results) <= CLOSE


@pytest.mark.parametrize("name, other", DEFAULTS)
def test_misspelt_settings_are_refused(name: str, other: str) -> None:
    for spacing in ("trailling", None):
        with pytest.raises(ValueError, match="timestep_spacing: expected 'leading' or 'trailing'"):
            getattr(ours, f"DiffusionFast{name}")(timestep_spacing=spacing)
    scheduler = getattr(ours, f"DiffusionFast{name}")(trained_betas=[0.1, 0.3])
    for steps in (2, 3):
        with pytest.raises(ValueError, match="trained_betas: expected num_train_timesteps = 1000"):
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize("name, other", DEFAULTS)
def test_add_noise_in_training(name: str, other: str) -> None:
    """Any timestep, before and after set_timesteps, in the level that the schedule has there."""
    mine, theirs = pair(name, other)
    x, z = torch.randn(2, 5, 3, 4, 4)
    t = torch.tensor([0, 17, 400, 998, 999])
    before = mine.add_noise(x, z, t)
    expected = diffusers.DDPMScheduler.from_config(theirs.config).add_noise(x, z, t)
    if name in ("Euler", "EulerAncestral", "Heun"):
        expected = expected / theirs.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    assert error(before, expected) <= CLOSE
    mine.set_timesteps(7)
    assert error(mine.add_noise(x, z, t), expected) <= CLOSE


@pytest.mark.parametrize("name, other, settings", SCHEDULERS)
def test_save_and_load(name: str, other: str, settings: dict[str, Any], tmp_path: Path) -> None:
    mine, theirs = pair(name, other, **settings)
    mine.save_pretrained(tmp_path)
    again = type(mine).from_pretrained(tmp_path)
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert again.config[key] == value
    assert all(map(torch.equal, run(again, 6), run(mine, 6)))
    back = type(theirs).from_pretrained(tmp_path)
    assert all(map(torch.equal, run(back, 6), run(theirs, 6)))


@pytest.mark.parametrize("name, other", DEFAULTS)
def test_model_index(
    name: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline saved with our scheduler loads with it; pickling and copying work as well."""
    for top in integrations.TOP_LEVEL:
        monkeypatch.setattr(diffusion_fast, top, getattr(integrations, top), raising=False)
    pipe = diffusers.DDPMPipeline(tiny.unet("sd"), pair(name, other)[0])
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusion_fast", f"DiffusionFast{name}"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is getattr(ours, f"DiffusionFast{name}")
    for other_one in (loaded, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert all(map(torch.equal, run(other_one, 6), run(pipe.scheduler, 6)))


def test_all_names_are_at_the_top() -> None:
    exported = {name for name in ours.__all__ if name.startswith("DiffusionFast")}
    assert exported | {"SchedulerMixin"} == set(integrations.TOP_LEVEL)
    for name in exported:
        assert getattr(integrations, name) is getattr(ours, name)
    with pytest.raises(AttributeError, match="no attribute 'DiffusionFastNothing'"):
        _ = integrations.DiffusionFastNothing


@pytest.mark.parametrize(
    "name, other, settings, match",
    [
        ("DDPM", "DDPMScheduler", {"variance_type": "learned"}, "variance_type: expected 'fixed"),
        ("DDPM", "DDPMScheduler", {"variance_type": "small"}, "variance_type: expected 'fixed"),
        ("DPMSolver", DEFAULTS[2][1], {"use_flow_sigmas": True}, "use_flow_sigmas"),
        (
            "DPMSolver",
            DEFAULTS[2][1],
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "solver_order: expected 1 or 2 for sde",
        ),
        ("UniPC", DEFAULTS[3][1], {"predict_x0": False}, "predict_x0: expected True"),
        (
            "Euler",
            DEFAULTS[4][1],
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type: expected 'discrete' with v_prediction",
        ),
    ],
)
def test_refused_settings(name: str, other: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pair(name, other, **settings)


def test_config_changed_by_a_pipeline() -> None:
    """Pipelines correct settings that they find outdated, behind the scheduler's back."""
    mine = ours.DiffusionFastDDIM(beta_schedule="scaled_linear", clip_sample=True, steps_offset=0)
    with pytest.warns(FutureWarning):
        tiny.pipeline(scheduler=mine)
    assert (mine.config.clip_sample, mine.config.steps_offset) == (False, 1)
    mine.set_timesteps(10)
    assert mine.timesteps[-1] == 1
    with pytest.raises(ValueError, match="timestep_spacing"):
        mine.register_to_config(timestep_spacing="even")


def test_importing_the_package_imports_no_diffusers() -> None:
    program = (
        "import sys, diffusion_fast.integrations as i\n"
        "assert 'diffusers' not in sys.modules\n"
        "i.diffusers.accelerate\n"
        "assert 'diffusers' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_diffusers() -> None:
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import diffusion_fast.integrations as i\n"
        "try: i.diffusers\n"
        "except ImportError as e: assert 'pip install diffusers' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
