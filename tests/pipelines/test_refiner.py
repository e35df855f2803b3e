"""SDXL's refiner: alone, and after a base that hands over with noise, as diffusers has both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from command_line import run
from diffusers_pipelines import NEGATIVE, PROMPT, SCHEDULERS, arguments, picture
from numerics import error
from PIL import Image
from safetensors import safe_open

from diffusion_fast.models import AutoencoderKL, UNet2DCondition
from diffusion_fast.pipelines import Batcher, StableDiffusion
from diffusion_fast.pipelines.single_file import save_single_file
from diffusion_fast.samplers import make_table
from diffusion_fast.schedule import DiffusionSchedule

TOLERANCE = 1e-4  # of max|latents|, as in test_pipeline_parity
Folder = Callable[[str], Path]


def judge(folder: Path, sampler: str, **spacing: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "final_sigmas_type"}
    config = {"clip_sample": False, "set_alpha_to_one": True} | config | spacing
    pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler][0]).from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusion, sampler: str, steps: int, **changes: Any) -> torch.Tensor:
    asked = {"guidance_scale": 5.0, "sampler": sampler, "seed": 3, "batch": 2, "output": "latent"}
    return pipe(PROMPT, NEGATIVE, steps=steps, **{**asked, **changes}).latents


def test_it_is_an_image_to_image_pipeline_of_diffusers(tiny_folder: Folder) -> None:
    index = json.loads((tiny_folder("refiner") / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    pipe = judge(tiny_folder("refiner"), "ddim")
    assert isinstance(pipe, diffusers.StableDiffusionXLImg2ImgPipeline)
    assert pipe.text_encoder is None
    assert pipe.config.requires_aesthetics_score


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_alone(tiny_folder: Folder, sampler: str) -> None:
    """From an image, at its own strength and scores or at others."""
    folder, image = tiny_folder("refiner"), picture()
    pipe, theirs = StableDiffusion.from_pretrained(folder), judge(folder, sampler)
    for options, own, named in (
        ({"strength": 0.3}, {}, {}),
        (
            {"strength": 0.6},
            {"strength": 0.6, "aesthetic_scores": (8, 1.5)},
            {"aesthetic_score": 8.0, "negative_aesthetic_score": 1.5},
        ),
    ):
        asked = {"image": image, "num_inference_steps": 10, "output_type": "latent"}
        expected = theirs(**arguments([3, 4], **asked, **options, **named)).images
        result = draw(pipe, sampler, 10, image=image, **own)
        assert error(result, expected) < TOLERANCE
    usual = draw(pipe, sampler, 10, image=image, strength=0.6)
    assert error(usual, result) > 1e-3  # the scores matter


def last_signal(sampler: str, **options: Any) -> float:
    """A of the state that a base leaves."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = DiffusionSchedule.from_config({"num_train_timesteps": 1000, **betas})
    return float(make_table(sampler, schedule, **options).next_levels[-1, 0])


@pytest.mark.parametrize("part", [0.7, 0.45])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [4, 20])
def test_handed_over(tiny_folder: Folder, sampler: str, part: float, steps: int) -> None:
    base = StableDiffusion.from_pretrained(tiny_folder("sdxl"))
    refiner = StableDiffusion.from_pretrained(tiny_folder("refiner"))
    their_base, their_refiner = (judge(tiny_folder(k), sampler) for k in ("sdxl", "refiner"))
    asked = {"num_inference_steps": steps, "output_type": "latent"}
    size = {"height": 64, "width": 80}
    begun = their_base(**arguments([3, 4], denoising_end=part, **asked, **size)).images
    mine = draw(base, sampler, steps, size=(64, 80), denoising_end=part)
    # Euler's state is x_0 + sigma noise in diffusers, and ours has unit variance.
    options = {"steps": steps, "denoising_end": part, "steps_offset": 1}
    signal = last_signal(sampler, **options) if sampler == "euler" else 1.0
    assert error(mine / signal, begun) < TOLERANCE
    expected = their_refiner(**arguments([3, 4], image=begun, denoising_start=part, **asked)).images
    result = draw(refiner, sampler, steps, image=mine, denoising_start=part)
    assert error(result, expected) < TOLERANCE
    whole = draw(base, sampler, steps, size=(64, 80))
    assert error(result, whole) > (0.01 if part < 0.5 else 1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_one_model_that_hands_over_to_itself(tiny_folder: Folder, sampler: str) -> None:
    """A sampler without memory draws what it draws in one go; where the cut is between steps, never
    between the two calls of one."""
    pipe = StableDiffusion.from_pretrained(tiny_folder("sdxl"))
    whole = draw(pipe, sampler, 10, size=64)
    first = draw(pipe, sampler, 10, size=64, denoising_end=0.5)
    middle = draw(pipe, sampler, 10, image=first, denoising_start=0.5, denoising_end=0.7)
    last = draw(pipe, sampler, 10, image=middle, denoising_start=0.7)
    assert error(last, whole) < 1e-5
    one = draw(pipe, sampler, 10, batch=1, image=middle[0], denoising_start=0.7)
    assert error(one, whole[:1]) < TOLERANCE


def test_saved(tiny_folder: Folder, tmp_path: Path) -> None:
    folder, image = tiny_folder("refiner"), picture()
    pipe = StableDiffusion.from_pretrained(folder)
    expected = draw(pipe, "ddim", 4, image=image)
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusion.from_pretrained(tmp_path / "saved")
    assert torch.equal(draw(again, "ddim", 4, image=image), expected)
    assert list(pipe.text.modules()) == ["text_encoder_2"]


def test_a_single_file(tiny_folder: Folder, tmp_path: Path) -> None:
    """Its text encoder stands in the first one's place; the bottom's depth is in its tensors."""
    folder, image = tiny_folder("refiner"), picture()
    pipe = StableDiffusion.from_pretrained(folder)
    torch.manual_seed(0)
    changes = {
        "block_out_channels": (64, 128, 128),
        "norm_num_groups": 32,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 64 + 5 * 256,
    }
    pipe.unet = UNet2DCondition(dataclasses.replace(pipe.unet.config, **changes)).eval()
    widths = {"block_out_channels": (32,) * 4, "norm_num_groups": 32}
    pipe.vae = AutoencoderKL(dataclasses.replace(pipe.vae.config, **widths)).eval()
    text = pipe.text.encoders[0].config.to_dict()
    text |= {"hidden_size": 64, "projection_dim": 64, "num_attention_heads": 1, "eos_token_id": 2}
    made = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text))
    pipe.text.encoders[0] = made.eval()
    save_single_file(pipe._parts(), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        names = set(file.keys())
    assert "conditioner.embedders.0.model.text_projection" in names
    assert not any(name.startswith("conditioner.embedders.1") for name in names)
    again = StableDiffusion.from_pretrained(tmp_path / "x.safetensors", tokenizer=folder)
    assert again.refines
    expected = draw(pipe, "ddim", 4, image=image)
    assert error(draw(again, "ddim", 4, image=image), expected) < TOLERANCE
    empty = draw(again, "ddim", 4, image=image, guidance_scale=1.0)
    assert error(empty, expected) > 1e-3


def test_bad_input(tiny_folder: Folder) -> None:
    refiner = StableDiffusion.from_pretrained(tiny_folder("refiner"))
    base = StableDiffusion.from_pretrained(tiny_folder("sdxl"))
    latents = torch.randn(1, 4, 8, 8)
    begun = {"image": latents, "denoising_start": 0.5}
    for pipe, options, message in (
        (refiner, {}, "image: expected one, or latents with denoising_start"),
        (refiner, {"image": picture(), "denoising_start": 0.5}, "image: expected latents"),
        (refiner, {"image": latents[:, :3], "denoising_start": 0.5}, "image: expected latents"),
        (refiner, {**begun, "mask": picture()}, "mask: expected None beside denoising_start"),
        (refiner, {**begun, "strength": 0.5}, "strength"),
        (refiner, {**begun, "size": 128}, r"size: expected None, or \(64, 64\)"),
        (refiner, {**begun, "batch": 3, "image": latents.expand(2, -1, -1, -1)}, "image: expected"),
        (refiner, {**begun, "denoising_end": 0.5}, "denoising_start: expected less than"),
        (refiner, {**begun, "denoising_start": 1.5}, r"denoising_start: expected a number in \(0"),
        (refiner, {**begun, "denoising_end": 0.52}, "expected parts with a step between them"),
        (refiner, {**begun, "aesthetic_scores": (6,)}, "aesthetic_scores: expected two numbers"),
        (base, {"aesthetic_scores": (6, 2)}, "aesthetic_scores: expected None"),
        (base, {"denoising_end": 0.01}, "expected parts with a step between them"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            pipe("a cat", steps=4, sampler="ddim", **options)
        assert "\n" not in str(raised.value)
    with Batcher(refiner) as batcher, pytest.raises(ValueError, match="denoising_start: expected"):
        batcher.submit("a cat", steps=2, **begun)


def test_on_the_command_line(tiny_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    common = ["sample", "a cat", "--model", tiny_folder("sdxl"), "--steps", 4, "--size", "80x64"]
    done = run(*common, "-o", out, "--refiner", tiny_folder("refiner"), "--refiner-start", 0.5)
    assert done.returncode == 0, done.stderr
    base = StableDiffusion.from_pretrained(tiny_folder("sdxl"))
    refiner = StableDiffusion.from_pretrained(tiny_folder("refiner"))
    begun = base("a cat", steps=4, size=(64, 80), denoising_end=0.5, output="latent")
    asked = {"sampler": base.scheduler.sampler, "denoising_start": 0.5}
    expected = refiner("a cat", steps=4, image=begun.latents, **asked).images[0]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    again = tmp_path / "again.png"
    assert run("sample", "--again", out, "-o", again).returncode == 0
    assert again.read_bytes() == out.read_bytes()
    for options, message in (
        (["--refiner", tiny_folder("sd15")], "--refiner: expected SDXL's refiner"),
        (["--refiner-start", 0.5], "--refiner-start: expected --refiner beside it"),
        (["--refiner", "nowhere"], "--refiner: nowhere"),
    ):
        done = run(*common, "-o", out, *options)
        assert done.returncode == 1
        assert message in done.stderr
