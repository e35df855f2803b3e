"""TAESD in a pipeline: in the place of the autoencoder as diffusers has it, and for previews."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from command_line import run
from diffusers_pipelines import PROMPT, arguments, picture, theirs
from numerics import error
from PIL import Image
from safetensors.torch import save_file
from unet_parity import random_weights

from diffusion_fast.models.tiny_autoencoder import AutoencoderTiny
from diffusion_fast.pipelines import StableDiffusion
from diffusion_fast.pipelines.parts import Parts
from diffusion_fast.pipelines.single_file import save_single_file

TOLERANCE = 1e-4  # of max|images|
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder, with the decoder in its own repository's layout beside."""
    place = tmp_path_factory.mktemp("taesd")
    widths = (8,) * 4
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths
    )
    model.load_state_dict(random_weights(model))
    model.eval().save_pretrained(place / "folder")
    state = {}
    for name, value in model.decoder.layers.state_dict().items():
        at, _, rest = name.partition(".")
        state[f"{int(at) + 1}.{rest}"] = value
    save_file(state, place / "taesd_decoder.safetensors")
    return place


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("task", ["", "Img2Img"])
def test_in_the_place_of_the_autoencoder(
    tiny_folder: Folder, taesd: Path, kind: str, task: str
) -> None:
    folder = tiny_folder(kind)
    pipe = StableDiffusion.from_pretrained(folder, vae=taesd / "folder")
    judge = theirs(folder, "ddim", task)
    judge.register_modules(vae=diffusers.AutoencoderTiny.from_pretrained(taesd / "folder"))
    start: dict[str, Any] = {"image": picture(), "strength": 0.7} if task else {}
    size: dict[str, Any] = {} if task else {"height": 64, "width": 80}
    asked = {"steps": 4, "guidance_scale": 5.0, "sampler": "ddim", "seed": 3, "batch": 2}
    result = pipe(
        PROMPT, "dark", output="tensor", **asked, **start, **({} if task else {"size": (64, 80)})
    )
    expected = judge(**arguments([3, 4], num_inference_steps=4, output_type="pt", **start, **size))
    assert isinstance(result.images, torch.Tensor)
    assert error(result.images, expected.images * 2 - 1) < TOLERANCE
    own = StableDiffusion.from_pretrained(folder)(PROMPT, "dark", output="tensor", **asked, **start)
    assert not task or error(own.latents, result.latents) > 0.01


def test_a_folder_with_one(tiny_folder: Folder, taesd: Path, tmp_path: Path) -> None:
    """Written, and read again by both."""
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"), vae=taesd / "folder")
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusion.from_pretrained(tmp_path / "saved")
    assert isinstance(again.vae, AutoencoderTiny)
    drawing = {"steps": 1, "size": 64, "output": "tensor"}
    expected = pipe("a cat", **drawing).images
    assert torch.equal(again("a cat", **drawing).images, expected)
    judge = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(judge.vae, diffusers.AutoencoderTiny)
    parts: Parts = pipe._parts()
    with pytest.raises(ValueError, match="vae: expected an AutoencoderKL, which such files have"):
        save_single_file(parts, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_previews(tiny_folder: Folder, taesd: Path) -> None:
    """They show what each step predicts, and change nothing of what is drawn."""
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    pipe.previews.load(taesd / "folder")
    judge = diffusers.AutoencoderTiny.from_pretrained(taesd / "folder")
    seen: list[Any] = []

    def look(step: int, t: float, latents: torch.Tensor) -> None:
        seen.append((latents, pipe.previews(latents, "tensor"), pipe.previews(latents)))

    noisy: list[Any] = []
    asked: dict[str, Any] = {"steps": 3, "size": 64, "batch": 2, "output": "tensor"}
    result = pipe("a cat", preview=look, callback=lambda *a: noisy.append(a[2]), **asked)
    assert len(seen) == 3
    assert torch.equal(noisy[-1], result.latents)
    assert error(seen[-1][0], result.latents) < TOLERANCE  # the last step goes to no noise
    assert error(seen[0][0], noisy[0]) > 0.1
    for latents, images, pictures in seen:
        with torch.no_grad():
            expected = judge.decode(latents).sample.clamp(-1, 1)
        assert error(images, expected) < TOLERANCE
        assert [one.size for one in pictures] == [(64, 64)] * 2
    plain = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    again = plain("a cat", steps=3, size=64, batch=2, output="tensor")
    assert torch.equal(result.images, again.images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="previews: expected a tiny autoencoder"):
        plain.previews(again.latents)
    plain.previews.load(taesd / "taesd_decoder.safetensors")
    assert torch.equal(
        plain.previews(again.latents, "tensor"), pipe.previews(again.latents, "tensor")
    )
    pipe.to(torch.float64)
    assert pipe.previews(again.latents, "tensor").dtype == torch.float32


def test_what_is_refused(tiny_folder: Folder, taesd: Path, tmp_path: Path) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    widths = (8,) * 4
    other = diffusers.AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="autoencoder: expected one of 4 latent channels"):
        pipe.previews.load(tmp_path / "other")
    with pytest.raises(ValueError, match="vae: expected one of 4 latent channels"):
        StableDiffusion.from_pretrained(tiny_folder("sd15"), vae=tmp_path / "other")
    with pytest.raises(ValueError, match="_class_name: expected AutoencoderTiny"):
        pipe.previews.load(tiny_folder("sd15") / "vae")
    file = taesd / "taesd_decoder.safetensors"
    half = StableDiffusion.from_pretrained(tiny_folder("sd15"), vae=file)
    half("a cat", steps=1, size=64)
    with pytest.raises(ValueError, match="vae: expected a model with an encoder"):
        half("a cat", steps=1, image=picture())


def test_on_the_command_line(tiny_folder: Folder, taesd: Path, tmp_path: Path) -> None:
    common = ["sample", "a cat", "--model", tiny_folder("sd15"), "--steps", 2, "--size", 64]
    out, shown = tmp_path / "x.png", tmp_path / "x.preview.png"
    done = run(*common, "-o", out, "--preview", taesd / "taesd_decoder.safetensors")
    assert done.returncode == 0, done.stderr
    drawn = tmp_path / "y.png"
    done = run(*common, "-o", drawn, "--vae", taesd / "taesd_decoder.safetensors")
    assert done.returncode == 0, done.stderr
    # The last preview shows the finished latents.
    assert np.array_equal(np.asarray(Image.open(shown)), np.asarray(Image.open(drawn)))
    plain = tmp_path / "z.png"
    assert run(*common, "-o", plain).returncode == 0
    assert out.read_bytes() == plain.read_bytes()
    done = run(*common, "-o", out, "--preview", tiny_folder("sd15") / "vae")
    assert done.returncode == 1
    assert "--preview: " in done.stderr
    done = run(*common, "--out-dir", tmp_path / "many", "--preview", taesd / "folder")
    assert done.returncode == 1
    assert "--preview: expected no --out-dir" in done.stderr
