"""The model that comes with the package: it draws what it is asked for, here and in diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

import diffusion_fast as df
from diffusion_fast.files import CheckpointError
from diffusion_fast.images import read_settings
from diffusion_fast.pipelines.card import CARD, Defaults, read_defaults
from diffusion_fast.pipelines.loading import SHIPPED

FOLDER = SHIPPED["emoji"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipe() -> df.StableDiffusion:
    return df.StableDiffusion.from_pretrained("emoji")


def test_it_is_small_and_says_whose_pictures_it_learned_from(pipe: df.StableDiffusion) -> None:
    networks = [pipe.unet, pipe.vae, *pipe.text.modules().values()]
    assert sum(p.numel() for one in networks for p in one.parameters()) <= 12e6
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 26e6
    card = (FOLDER / CARD).read_text(encoding="utf-8")
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for name in ("Noto Emoji", "Fluent Emoji", "Unicode", "Apache", "MIT"):
        assert name in card
        assert name in notice
    assert pipe.defaults == read_defaults(FOLDER) != Defaults()


def test_diffusers_draws_the_same(pipe: df.StableDiffusion) -> None:
    ours = pipe("a red apple", steps=4, seed=3, output="tensor").images
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red apple",
        num_inference_steps=4,
        guidance_scale=pipe.defaults.guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    assert isinstance(ours, torch.Tensor)
    assert (ours - (2 * expected - 1)).abs().max() < 1e-3


def test_colors_are_those_asked_for(
    pipe: df.StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "emoji")
    from captions import dominant_color

    asked = {"a red heart": "red", "a blue heart": "blue", "a green apple": "green"}
    drawn = pipe(list(asked), steps=10).images
    assert [dominant_color(np.asarray(one))[0] for one in drawn] == list(asked.values())


def test_it_is_the_default_of_the_command_line(pipe: df.StableDiffusion, tmp_path: Path) -> None:
    done = run("sample", "a red apple", "-o", tmp_path / "apple.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    settings = read_settings(tmp_path / "apple.png")
    assert settings["model"] == "emoji"
    assert settings["steps"] == str(pipe.defaults.steps)
    assert float(settings["guidance"]) == pipe.defaults.guidance_scale
    assert Image.open(tmp_path / "apple.png").size == (64, 64)
    done = run("sample", "--again", tmp_path / "apple.png", "-o", tmp_path / "again.png")
    assert done.returncode == 0, done.stderr
    first, again = (Image.open(tmp_path / f"{name}.png") for name in ("apple", "again"))
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("prompt", ["", "zxqv \N{DRAGON} Ünïcode 龍", "apple " * 60])
def test_any_prompt_draws(pipe: df.StableDiffusion, prompt: str) -> None:
    latents = pipe(prompt, steps=2, output="latent").latents
    assert latents.isfinite().all()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_weights_that_are_missing_or_damaged_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / "emoji")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    monkeypatch.setitem(SHIPPED, "emoji", copy)
    with pytest.raises(CheckpointError, match="unet"):
        df.StableDiffusion.from_pretrained("emoji")
    done = run("sample", "a red apple", "-o", tmp_path / "x.png")
    assert done.returncode == 1
    assert "unet" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.png").exists()
