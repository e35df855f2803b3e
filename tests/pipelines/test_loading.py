"""What from_pretrained reads, what it refuses, and what save_pretrained writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compvis_files import VAES, vae_states, write_file
from diffusers_pipelines import arguments, picture, theirs
from numerics import error
from safetensors.torch import load_file, save_file

from diffusion_fast.models import CheckpointError, UNet2DCondition
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig
from diffusion_fast.pipelines import StableDiffusion
from diffusion_fast.pipelines.loading import load
from diffusion_fast.pipelines.tiny_tokenizer import vocabulary

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

Folder = Callable[[str], Path]
TOLERANCE = 1e-4
TOKENS = len(vocabulary()[0])  # of the tiny tokenizer


@pytest.mark.parametrize(
    ("channels", "name"), [(5, "SD 2.x depth"), (7, "upscaler x4"), (8, "instruct-pix2pix")]
)
def test_models_known_by_their_input_channels_are_refused_by_name(channels: int, name: str) -> None:
    parts = load("tiny")
    parts.unet = UNet2DCondition(dataclasses.replace(parts.unet.config, in_channels=channels))
    with pytest.raises(ValueError, match=f"unet: expected .*{name}, which is not") as raised:
        parts.check_fit()
    assert "\n" not in str(raised.value)


def changed(folder: Path, copy: Path, **index: Any) -> Path:
    """A copy of a model with another model_index.json."""
    shutil.copytree(folder, copy)
    file = copy / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return copy


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "inpainting"])
def test_a_saved_folder_is_what_diffusers_loads(
    tiny_folder: Folder, tmp_path: Path, kind: str
) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder(kind))
    pipe.save_pretrained(tmp_path / "saved")
    sampler = pipe.scheduler.sampler
    start: dict[str, Any] = {}
    if kind == "inpainting":
        start = {"image": picture(64, 64), "mask": picture(64, 64)}
    call = arguments([2], output_type="latent", height=64, width=64)
    drawing = {"steps": 5, "guidance_scale": call["guidance_scale"], "seed": 2, **start}
    again = StableDiffusion.from_pretrained(tmp_path / "saved")
    first, second = (
        one(call["prompt"], call["negative_prompt"], output="latent", **drawing).latents
        for one in (pipe, again)
    )
    assert torch.equal(first, second)
    assert again.random_weights
    judge = theirs(tmp_path / "saved", sampler, "Inpaint" if start else "")
    if start:
        call |= {"image": start["image"], "mask_image": start["mask"], "strength": 1.0}
    assert error(first, judge(**call).images) < TOLERANCE


@pytest.mark.parametrize(("kind", "tokens"), [("sd1", "sd15"), ("sd2", "sd21"), ("sdxl", "sdxl")])
def test_a_single_file(tiny_folder: Folder, tmp_path: Path, kind: str, tokens: str) -> None:
    """The folder made of it draws the same in diffusers.

    Random weights of this size make the rounding of a few steps as large as 0.1, for both; with a
    small last convolution they don't.
    """
    path, states = write_file(kind, tmp_path)
    for name, value in states.items():
        if "token_embedding" in name:  # as many as the tiny tokenizer has
            states[name] = torch.randn(TOKENS, value.shape[1])
        elif "diffusion_model.out.2." in name:
            states[name] = value * 0.05
    save_file(states, path)
    with pytest.raises(CheckpointError, match="a single file holds no tokenizer; pass tokenizer="):
        StableDiffusion.from_pretrained(path)
    options: dict[str, Any] = {"tokenizer": tiny_folder(tokens), "prediction_type": "epsilon"}
    pipe = StableDiffusion.from_pretrained(path, **options)
    pipe.save_pretrained(tmp_path / "saved")
    call = arguments([2], output_type="latent", height=64, width=64, num_inference_steps=2)
    prompts = call["prompt"], call["negative_prompt"]
    drawing = {"steps": 2, "seed": 2, "size": 64, "guidance_scale": call["guidance_scale"]}
    ours = pipe(*prompts, **drawing, output="latent")
    assert not ours.random_weights  # as far as the file says
    exact = StableDiffusion.from_pretrained(path, dtype=torch.float64, **options)
    truth = exact(*prompts, **drawing, output="latent").latents
    judge = theirs(tmp_path / "saved", pipe.scheduler.sampler)(**call).images
    assert error(judge, truth) < TOLERANCE
    assert error(ours.latents, truth) < TOLERANCE


def test_v_prediction_of_a_single_file(tiny_folder: Folder, tmp_path: Path) -> None:
    path, states = write_file("sd2", tmp_path)
    name = next(name for name in states if "token_embedding" in name)
    save_file(states | {name: torch.randn(TOKENS, states[name].shape[1])}, path)
    with pytest.warns(UserWarning, match="doesn't tell .* pass prediction_type='v_prediction'"):
        base = StableDiffusion.from_pretrained(path, tokenizer=tiny_folder("sd21"))
    assert base.scheduler.table()["prediction_type"] == "epsilon"
    for kind, size in (("epsilon", 64), ("v_prediction", 96)):  # for 512 x 512 and 768 x 768
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = StableDiffusion.from_pretrained(
                path, tokenizer=tiny_folder("sd21"), prediction_type=kind
            )
        assert pipe.scheduler.table()["prediction_type"] == kind
        assert pipe.unet.config.sample_size == size


def test_a_file_that_says_v_prediction_and_zero_snr(tiny_folder: Folder, tmp_path: Path) -> None:
    """diffusers reads the same from the folder that we write; what the user says comes first."""
    path, states = write_file("sdxl", tmp_path)
    for name, value in states.items():
        if "token_embedding" in name:
            states[name] = torch.randn(TOKENS, value.shape[1])
    save_file(states | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    pipe = StableDiffusion.from_pretrained(path, tokenizer=tiny_folder("sdxl"))
    made = pipe("a cat", steps=2, size=64, output="latent")
    assert made.settings["prediction_type"] == "v_prediction"
    assert made.settings["timestep_spacing"] == "trailing"
    assert made.latents.isfinite().all()
    pipe.save_pretrained(tmp_path / "saved")
    judge = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "saved" / "scheduler")
    assert judge.alphas_cumprod[-1] < 1e-6
    assert judge.config.prediction_type == "v_prediction"
    told = StableDiffusion.from_pretrained(
        path, tokenizer=tiny_folder("sdxl"), prediction_type="sample"
    )
    assert told.scheduler.table()["prediction_type"] == "sample"


@pytest.mark.parametrize(("kind", "factor"), [("sd15", 0.18215), ("sdxl", 0.13025)])
def test_a_vae_file_of_its_own_takes_the_models_scaling_factor(
    tiny_folder: Folder, tmp_path: Path, kind: str, factor: float
) -> None:
    file = tmp_path / "vae.safetensors"
    save_file(vae_states(VAES["sd1"], ""), file)
    folder = shutil.copytree(tiny_folder(kind), tmp_path / "copy")
    config = folder / "vae" / "config.json"
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.append(StableDiffusion.from_pretrained(folder, vae=file))
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
        found.append(StableDiffusion.from_pretrained(folder, vae=file))
        shutil.rmtree(folder / "vae")  # nobody needs it
        found.append(StableDiffusion.from_pretrained(folder, vae=file))
    assert [pipe.vae.config.scaling_factor for pipe in found] == [factor, 0.5, factor]


def test_a_vae_with_a_config_keeps_its_scaling_factor(tiny_folder: Folder) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"), vae=tiny_folder("sdxl"))
    assert pipe.vae.config.scaling_factor == 0.13025


def test_another_vae(tiny_folder: Folder, tmp_path: Path) -> None:
    vae = AutoencoderKL(VAEConfig.preset("tiny", block_out_channels=(4, 4, 8, 8)))
    vae.save_pretrained(tmp_path / "vae")
    drawing = {"steps": 1, "output": "tensor"}
    plain = StableDiffusion.from_pretrained(tiny_folder("sd15"))("a cat", **drawing)
    given, read = (
        StableDiffusion.from_pretrained(tiny_folder("sd15"), vae=one)("a cat", **drawing)
        for one in (vae, tmp_path / "vae")
    )
    assert torch.equal(given.latents, plain.latents)
    assert torch.equal(given.images, read.images)
    assert error(given.images, plain.images) > 0.1
    wide = AutoencoderKL(VAEConfig.preset("tiny", latent_channels=16))
    with pytest.raises(ValueError, match=r"vae: expected one of 4 latent channels, .*, got 16"):
        StableDiffusion.from_pretrained(tiny_folder("sd15"), vae=wide)


def test_variants(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("sdxl"), tmp_path / "copy")
    for file in folder.rglob("*.safetensors"):
        halves = {name: value.half() for name, value in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"))
        file.unlink()
    with pytest.raises(CheckpointError, match="pass variant='fp16'"):
        StableDiffusion.from_pretrained(folder)
    pipe = StableDiffusion.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    exact = StableDiffusion.from_pretrained(tiny_folder("sdxl"))
    pictures = [one("a cat", steps=2, output="latent").latents for one in (pipe, exact)]
    assert error(*pictures) < 0.01
    kept = StableDiffusion.from_pretrained(folder, variant="fp16")
    assert {p.dtype for p in kept.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in kept.text.encoders[1].parameters()} == {torch.float16}


def test_a_variant_of_some_parts_only(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("sdxl"), tmp_path / "copy")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        file = folder / part / f"{stem}.safetensors"
        file.rename(file.with_name(f"{stem}.fp16.safetensors"))
    plain, mixed = (
        StableDiffusion.from_pretrained(one, variant=variant)("a cat", steps=1, output="latent")
        for one, variant in ((tiny_folder("sdxl"), None), (folder, "fp16"))
    )
    assert torch.equal(plain.latents, mixed.latents)
    with pytest.raises(CheckpointError, match="no model in it has weights of 'bf16'"):
        StableDiffusion.from_pretrained(folder, variant="bf16")


def test_a_whole_clip_as_text_encoder(tiny_folder: Folder, tmp_path: Path) -> None:
    """What else it has is left alone, and its config's text half is read."""
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path / "copy")
    place = folder / "text_encoder"
    text = json.loads((place / "config.json").read_text())
    extra = {
        "vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(3),
        "visual_projection.weight": torch.ones(3, 3),
        "text_projection.weight": torch.ones(3, 3),
        "logit_scale": torch.ones(()),
    }
    save_file(load_file(place / "model.safetensors") | extra, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipes = [StableDiffusion.from_pretrained(one) for one in (tiny_folder("sd15"), folder)]
    first, second = (one.text.encode(["a cat"]).context for one in pipes)
    assert torch.equal(first, second)


def test_a_folder_of_pickles(tiny_folder: Folder, tmp_path: Path) -> None:
    """As they were before safetensors."""
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path / "copy")
    for file in folder.rglob("*.safetensors"):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    pipes = [StableDiffusion.from_pretrained(one) for one in (tiny_folder("sd15"), folder)]
    first, second = (one("a cat", steps=2, output="latent").latents for one in pipes)
    assert torch.equal(first, second)


def test_a_folder_that_is_no_model(tmp_path: Path, tiny_folder: Folder) -> None:
    with pytest.raises(CheckpointError, match="not a Stable Diffusion model, it has no model_ind"):
        StableDiffusion.from_pretrained(tmp_path)
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match="it holds one U-Net"):
        StableDiffusion.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        StableDiffusion.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        *("StableDiffusion3Pipeline", "FluxPipeline", None),
        *("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
        *("StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline"),
        *("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"),
    ],
)
def test_an_unsupported_model_is_named(
    tiny_folder: Folder, tmp_path: Path, name: str | None
) -> None:
    folder = changed(tiny_folder("sd15"), tmp_path / "copy", _class_name=name)
    with pytest.raises(CheckpointError, match=f"{name} is not supported, only StableDiffusionPip"):
        StableDiffusion.from_pretrained(folder)


def test_text_encoders_that_the_pipeline_does_not_have(tiny_folder: Folder, tmp_path: Path) -> None:
    name = "StableDiffusionXLImg2ImgPipeline"
    folder = changed(tiny_folder("sd15"), tmp_path / "copy", _class_name=name)
    with pytest.raises(
        CheckpointError, match=r"expected a text_encoder_2 for .*, got text_encoder"
    ):
        StableDiffusion.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", "[", "model_index.json: can't be read as JSON"),
        ("model_index.json", "[]", "model_index.json: expected a JSON object"),
        ("scheduler/scheduler_config.json", "{}", "scheduler_config.json: _class_name: expected"),
        ("unet/diffusion_pytorch_model.safetensors", "x", "truncated, or not a safetensors file"),
        ("vae/config.json", None, "vae"),
        ("text_encoder/model.safetensors", None, "text_encoder: expected model.safetensors"),
    ],
)
def test_damaged_folders(
    tiny_folder: Folder, tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path / "copy")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        StableDiffusion.from_pretrained(folder)


def test_parts_of_other_models(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    shutil.copytree(tiny_folder("sdxl") / "unet", folder / "unet")
    with pytest.raises(ValueError, match=r"text_encoder: expected states of 64 .*, got 32"):
        StableDiffusion.from_pretrained(folder)


def test_a_full_disk_leaves_no_half_written_model(
    pipe: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_fast.models.clip_weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
