"""LoRAs in a pipeline and on the command line, beside diffusers with the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from command_line import run
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import nn

from diffusion_fast.pipelines import StableDiffusion

SETTINGS = {"guidance_scale": 5.0, "output_type": "np"}


def write_lora(folder: Path, out: Path, seed: int) -> Path:
    """A random LoRA for U-Net and text encoder, written by diffusers."""
    torch.manual_seed(seed)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    layers, settings = [], []
    targets = (["to_q", "to_v", "to_out.0", "conv1"], ["q_proj", "fc1"])
    for network, names in zip((pipe.unet, pipe.text_encoder), targets, strict=True):
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=names))
        for name, value in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.2)
        layers.append(get_peft_model_state_dict(network))
        settings.append(network.peft_config["default"].to_dict())
    diffusers.StableDiffusionPipeline.save_lora_weights(
        out.parent,
        *layers,
        weight_name=out.name,
        unet_lora_adapter_metadata=settings[0],
        text_encoder_lora_adapter_metadata=settings[1],
    )
    return out


@pytest.fixture(scope="module")
def files(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(tiny_folder("sd15"), folder / f"{i}.safetensors", i) for i in (1, 2)]


def test_two_with_scales_draw_what_diffusers_draws(
    tiny_folder: Callable[[str], Path], files: list[Path]
) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder("sd15"))
    theirs.set_progress_bar_config(disable=True)
    ours = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scales = {"first": 0.7, "second": -0.4}
    for name, file in zip(scales, files, strict=True):
        ours.loras.load(file, name)
        theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    ours.loras.set(scales)
    theirs.set_adapters(list(scales), list(scales.values()))
    got = ours("a cat", steps=4, guidance_scale=5.0, output="tensor", size=64).images
    wanted = theirs("a cat", num_inference_steps=4, latents=noise, height=64, width=64, **SETTINGS)
    wanted = torch.from_numpy(wanted.images).permute(0, 3, 1, 2) * 2 - 1
    assert isinstance(got, torch.Tensor)
    assert (got - wanted).abs().max() < 1e-4


def test_switching_between_calls_leaves_no_trace(
    tiny_folder: Callable[[str], Path], files: list[Path]
) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))

    def draw() -> torch.Tensor:
        images = pipe("a cat", steps=3, size=64, output="tensor").images
        assert isinstance(images, torch.Tensor)
        return images

    plain = draw()
    pipe.loras.load(files[0], "first")
    first = draw()
    pipe.loras.load(files[1], "second")
    pipe.loras.set({"second": 1.0})
    second = draw()
    pipe.loras.set({"first": 1.0})
    assert torch.equal(draw(), first)
    pipe.loras.set()
    assert torch.equal(draw(), plain)
    for one, other in ((plain, first), (plain, second), (first, second)):
        assert (one - other).abs().max() > 1e-3


def test_on_the_command_line(
    tiny_folder: Callable[[str], Path], files: list[Path], tmp_path: Path
) -> None:
    model, again = tiny_folder("sd15"), tmp_path / "again.png"
    common = ("--model", model, "--steps", 2, "--size", 64)
    pictures = {}
    for name, loras in {"none": (), "one": (f"{files[0]}=0.5",), "two": tuple(files)}.items():
        out = tmp_path / f"{name}.png"
        options = [part for lora in loras for part in ("--lora", lora)]
        done = run("sample", "a cat", "-o", out, *common, *options)
        assert done.returncode == 0, done.stderr
        pictures[name] = np.asarray(Image.open(out))
    assert (pictures["one"] != pictures["none"]).any()
    assert (pictures["one"] != pictures["two"]).any()
    assert run("sample", "--again", tmp_path / "two.png", "-o", again).returncode == 0
    assert again.read_bytes() == (tmp_path / "two.png").read_bytes()
    done = run("sample", "a cat", "-o", tmp_path / "x.png", *common, "--lora", f"{files[0]}=much")
    assert "--lora: expected a file, or FILE=SCALE" in done.stderr
    done = run("sample", "a cat", "-o", tmp_path / "x.png", *common, "--lora", "nowhere")
    assert "nowhere" in done.stderr
    assert done.returncode == 1
