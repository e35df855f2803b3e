"""Our pipelines and diffusers', the same weights and seeds: latents and images to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_pipelines import (
    GUIDANCE,
    NEGATIVE,
    PROMPT,
    SCHEDULERS,
    STEPS,
    arguments,
    mask,
    picture,
    theirs,
)
from numerics import error

from diffusion_fast.pipelines import Result, StableDiffusion

TOLERANCE = 1e-4  # of max|latents|; about 1e-6 is seen
Folder = Callable[[str], Path]


def ours(folder: Path, sampler: str, seed: int, **arguments: Any) -> Result:
    pipe = StableDiffusion.from_pretrained(folder)
    drawing = {"steps": STEPS, "guidance_scale": GUIDANCE, "sampler": sampler, "seed": seed}
    return pipe(PROMPT, NEGATIVE, **drawing, **arguments)


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_text_to_image(tiny_folder: Folder, kind: str, sampler: str) -> None:
    folder = tiny_folder(kind)
    size = {"height": 64, "width": 72}
    result = ours(folder, sampler, 3, batch=2, size=(64, 72), output="tensor")
    judge = theirs(folder, sampler)
    latents = judge(**arguments([3, 4], output_type="latent", **size)).images
    images = judge.vae.decode(latents / judge.vae.config.scaling_factor).sample.detach()
    assert error(result.latents, latents) < TOLERANCE
    assert error(result.images, images.clamp(-1, 1)) < TOLERANCE
    assert result.seeds == [3, 4]


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_one_step(tiny_folder: Folder, sampler: str) -> None:
    """From pure noise with trailing timesteps; with others DDIM's and Euler's single step begins
    where no noise is left in diffusers, and at the last timestep here.
    """
    folder, judge = tiny_folder("sd15"), theirs(tiny_folder("sd15"), sampler)
    spacing = {"timestep_spacing": "trailing"}
    judge.scheduler = type(judge.scheduler).from_config(judge.scheduler.config, **spacing)
    asked = {"num_inference_steps": 1, "output_type": "latent", "height": 64, "width": 64}
    expected = judge(**arguments([3], **asked)).images
    pipe = StableDiffusion.from_pretrained(folder)
    drawing = {"guidance_scale": GUIDANCE, "sampler": sampler, "seed": 3, "size": 64}
    result = pipe(PROMPT, NEGATIVE, steps=1, output="latent", **drawing, **spacing)
    assert error(result.latents, expected) < TOLERANCE


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_image_to_image(tiny_folder: Folder, kind: str, sampler: str) -> None:
    folder, image = tiny_folder(kind), picture()
    result = ours(folder, sampler, 5, batch=2, image=image, strength=0.65, output="latent")
    judge = theirs(folder, sampler, "Img2Img")
    drawing = arguments([5, 6], image=image, strength=0.65, output_type="latent")
    assert error(result.latents, judge(**drawing).images) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.65])
@pytest.mark.parametrize(("kind", "sampler"), [("sd15", "dpmpp_2m"), ("inpainting", "euler")])
def test_inpainting(tiny_folder: Folder, kind: str, sampler: str, strength: float) -> None:
    """One image: of a batch, diffusers encodes the first one's only."""
    folder, image, hole = tiny_folder(kind), picture(), mask()
    result = ours(folder, sampler, 7, image=image, mask=hole, strength=strength, output="latent")
    judge = theirs(folder, sampler, "Inpaint")
    size = {"height": 64, "width": 80, "output_type": "latent"}
    drawing = arguments([7], image=image, mask_image=hole, strength=strength, **size)
    assert error(result.latents, judge(**drawing).images) < TOLERANCE


def test_an_absent_negative_prompt_of_sdxl(tiny_folder: Folder) -> None:
    """States of zero, not those of the empty prompt."""
    folder = tiny_folder("sdxl")
    pipe = StableDiffusion.from_pretrained(folder)
    absent = pipe(PROMPT, None, steps=2, guidance_scale=GUIDANCE, sampler="ddim", output="latent")
    empty = pipe(PROMPT, "", steps=2, guidance_scale=GUIDANCE, sampler="ddim", output="latent")
    drawing = arguments([0], num_inference_steps=2, negative_prompt=None, output_type="latent")
    expected = theirs(folder, "ddim")(**drawing).images
    assert error(absent.latents, expected) < TOLERANCE
    assert error(empty.latents, expected) > 100 * TOLERANCE


def test_a_folder_that_diffusers_wrote(tiny_folder: Folder, tmp_path: Path) -> None:
    """Also with its guidance off, which both run without the negative prompt."""
    judge = theirs(tiny_folder("sd15"), "euler")
    judge.save_pretrained(tmp_path)
    result = StableDiffusion.from_pretrained(tmp_path)(
        PROMPT, NEGATIVE, steps=STEPS, guidance_scale=1.0, output="latent"
    )
    expected = judge(**arguments([0], guidance_scale=1.0, output_type="latent")).images
    assert error(result.latents, expected) < TOLERANCE
    assert result.settings["sampler"] == "euler"


@torch.no_grad()
def test_the_rest_of_the_image_is_kept(pipe: StableDiffusion) -> None:
    image, hole = picture(), mask()
    result = pipe("a cat", steps=4, image=image, mask=hole, output="latent")
    other = pipe("a big red dog", steps=4, image=image, mask=hole, output="latent")
    kept = torch.ones(8, 10, dtype=torch.bool)
    kept[3:6, 4:9] = False
    kept[6:, :2] = False
    assert torch.equal(result.latents[..., kept], other.latents[..., kept])
    assert not torch.equal(result.latents, other.latents)
