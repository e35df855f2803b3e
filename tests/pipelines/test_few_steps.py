"""Distilled models in one to eight steps (LCM, Turbo, Lightning, Hyper-SD, TCD): as diffusers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from control_parity import controlnet_of, saved
from diffusers_pipelines import PROMPT, arguments, picture
from numerics import error
from safetensors.torch import save_file

from diffusion_fast.files import CheckpointError
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.pipelines import StableDiffusion, make_tiny

TOLERANCE = 1e-4  # of max|latents|, as in test_pipeline_parity
Folder = Callable[[str], Path]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def lcm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes the guidance scale as an input, every layer of it random."""
    folder = make_tiny(tmp_path_factory.mktemp("lcm") / request.param, request.param)
    config = UNet2DCondition.from_pretrained(folder).config
    torch.manual_seed(1)
    UNet2DCondition(dataclasses.replace(config, time_cond_proj_dim=16)).save_pretrained(
        folder / "unet"
    )
    scheduler = diffusers.LCMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    if request.param == "sd15":  # as such models are published
        index["_class_name"] = "LatentConsistencyModelPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def judged(folder: Path, scheduler: Any = None, **drawing: Any) -> torch.Tensor:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    if scheduler is not None:
        pipe.scheduler = scheduler(pipe.scheduler.config)
    if "image" in drawing:
        pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    drawing = arguments([3, 4], output_type="latent", **drawing)
    if drawing["negative_prompt"] is None:  # which the pipeline of LCM doesn't have
        del drawing["negative_prompt"]
    return pipe(**drawing).images


def test_a_plain_unet_in_the_pipeline_of_lcm_is_refused(tmp_path: Path) -> None:
    """diffusers' pipeline can't run it either: it has nowhere to put the guidance scale."""
    folder = make_tiny(tmp_path / "sd15", "sd15")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "LatentConsistencyModelPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    expected = "takes the guidance scale, as LatentConsistencyModelPipeline has, got no time_cond"
    with pytest.raises(CheckpointError, match=expected):
        StableDiffusion.from_pretrained(folder)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_guidance_scale_as_an_input(lcm: Path, steps: int) -> None:
    pipe = StableDiffusion.from_pretrained(lcm)
    drawing = {"batch": 2, "seed": 3, "size": 64, "output": "latent", "steps": steps}
    result = pipe(PROMPT, guidance_scale=6.3, **drawing)
    other = pipe(PROMPT, guidance_scale=1.5, **drawing)
    assert error(other.latents, result.latents) > 0.01
    expected = judged(
        lcm,
        negative_prompt=None,
        guidance_scale=6.3,
        num_inference_steps=steps,
        height=64,
        width=64,
    )
    assert error(result.latents, expected) < TOLERANCE
    assert result.settings["guidance_scale"] == 6.3
    assert result.settings["sampler"] == "lcm"


def test_its_rewrites_and_defaults(lcm: Path, tmp_path: Path) -> None:
    """The scale is a number of a run: another one takes no new engine."""
    pipe = StableDiffusion.from_pretrained(lcm)
    plain = StableDiffusion.from_pretrained(lcm, rewrites="none")
    sdxl = pipe.unet.config.addition_embed_type is not None
    assert pipe.defaults.steps == (20 if sdxl else 4)
    for scale in (8.5, 2.0):
        drawing = {"steps": 2, "guidance_scale": scale, "output": "latent"}
        assert error(pipe(PROMPT, **drawing).latents, plain(PROMPT, **drawing).latents) < 1e-5
    assert pipe._engine is not None
    rows = {row.name: row for row in pipe._engine.explain()["rewrites"]}
    assert rows["time_table"].on
    assert rows["shared_prefix"].why == "one half of guidance runs"
    pipe.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.defaults == pipe.defaults
    assert torch.equal(again(PROMPT, **drawing).latents, pipe(PROMPT, **drawing).latents)


def test_image_to_image_of_lcm(lcm: Path) -> None:
    pipe = StableDiffusion.from_pretrained(lcm)
    drawing = {"image": picture(), "strength": 0.5}
    result = pipe(PROMPT, guidance_scale=4.0, batch=2, seed=3, steps=4, output="latent", **drawing)
    if pipe.unet.config.addition_embed_type is None:
        # Its own pipeline places the timesteps by the strength; the usual one takes the last.
        parts = diffusers.DiffusionPipeline.from_pretrained(lcm).components
        parts.pop("requires_safety_checker", None)
        judge = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        judge.set_progress_bar_config(disable=True)
        drawing = arguments([3, 4], guidance_scale=4.0, num_inference_steps=4, **drawing)
        expected = judge(output_type="latent", **drawing).images
    else:
        expected = judged(lcm, guidance_scale=4.0, num_inference_steps=4, **drawing)
    assert error(result.latents, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_prompt": "dark"}, "negative_prompt: expected None for a model that has the"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale: expected one number for a model"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: expected none for a model"),
    ],
)
def test_what_such_a_model_cannot(lcm: Path, arguments: dict[str, Any], message: str) -> None:
    pipe = StableDiffusion.from_pretrained(lcm)
    with pytest.raises(ValueError, match=message) as raised:
        pipe(PROMPT, steps=2, **arguments)
    assert "\n" not in str(raised.value)


SCHEDULERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "turbo": ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral", {}),
    "lightning": ("EulerDiscreteScheduler", {}, "euler", {}),
    "hyper_sd": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, "ddim", {}),
    "tcd": ("TCDScheduler", {}, "tcd", {"eta": 0.3}),
    "lcm": ("LCMScheduler", {"clip_sample": False}, "lcm", {}),
}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_trailing_steps_without_guidance(tiny_folder: Folder, name: str, kind: str) -> None:
    """At the scale 0 or 1, with the scheduler's own timesteps; a LoRA distills the model."""
    theirs, changes, sampler, options = SCHEDULERS[name]
    folder = tiny_folder(kind)
    pipe = StableDiffusion.from_pretrained(folder)

    def trailing(config: Any) -> Any:
        usual = {k: v for k, v in config.items() if k != "final_sigmas_type"}
        cls = getattr(diffusers, theirs)
        return cls.from_config(usual, timestep_spacing="trailing", **changes)

    options = {"sampler": sampler, "timestep_spacing": "trailing", **options}
    for steps, scale in ((1, 0.0), (4, 1.0), (8, 0.0)):
        drawing = {"steps": steps, "guidance_scale": scale, "size": 64, "output": "latent"}
        result = pipe(PROMPT, batch=2, seed=3, **drawing, **options)
        size = {"height": 64, "width": 64}
        asked = {"num_inference_steps": steps, "guidance_scale": scale, **size}
        noise = {name: options[name] for name in ("eta",) if name in options}
        expected = judged(folder, trailing, negative_prompt=None, **asked, **noise)
        assert error(result.latents, expected) < TOLERANCE, steps


def test_one_step_at_a_timestep_of_ones_own(tiny_folder: Folder) -> None:
    """As Hyper-SDXL's U-Net in one step wants it."""
    folder = tiny_folder("sdxl")
    pipe = StableDiffusion.from_pretrained(folder)
    drawing = {"sampler": "lcm", "steps": 1, "guidance_scale": 0, "size": 64, "output": "latent"}
    result = pipe(PROMPT, batch=2, seed=3, timesteps=[800], **drawing)
    expected = judged(
        folder,
        lambda config: diffusers.LCMScheduler.from_config(config, clip_sample=False),
        negative_prompt=None,
        num_inference_steps=None,
        timesteps=[800],
        guidance_scale=0.0,
        height=64,
        width=64,
    )
    assert error(result.latents, expected) < TOLERANCE


def lora(folder: Path, unet: UNet2DCondition) -> Path:
    """A LoRA of rank 2 for all products and convolutions, as LCM's is published."""
    torch.manual_seed(7)
    state = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "emb" not in name:
            weight, stem = layer.weight, "lora_unet_" + name.replace(".", "_")
            down = (2, *weight.shape[1:])
            state[f"{stem}.lora_down.weight"] = torch.randn(down) * weight[0].numel() ** -0.5
            up = (len(weight), 2, *([1] * (weight.dim() - 2)))
            state[f"{stem}.lora_up.weight"] = torch.randn(up) * 0.2
            state[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(state, folder / "lcm_lora.safetensors")
    return folder / "lcm_lora.safetensors"


@pytest.mark.parametrize("steered", [False, True], ids=["alone", "with a ControlNet"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_that_distills(
    tiny_folder: Folder, tmp_path: Path, kind: str, steered: bool
) -> None:
    """LCM-LoRA: four steps of its scheduler, guided a little; with a scale, beside no LoRA."""
    folder = tiny_folder(kind)
    pipe = StableDiffusion.from_pretrained(folder)
    file = lora(tmp_path, pipe.unet)
    drawing = {"sampler": "lcm", "guidance_scale": 1.5, "size": 64, "output": "latent"}
    before = pipe(PROMPT, "dark", steps=4, seed=3, **drawing).latents
    pipe.loras.load(file, "lcm", 0.8)
    judge = diffusers.DiffusionPipeline.from_pretrained(folder)
    judge.scheduler = diffusers.LCMScheduler.from_config(judge.scheduler.config, clip_sample=False)
    judge.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="lcm")
    judge.set_adapters(["lcm"], [0.8])
    hint: dict[str, Any] = {}
    if steered:
        net = controlnet_of(folder, 1)
        plain = pipe(PROMPT, "dark", steps=4, seed=3, **drawing).latents
        pipe.load_control(saved(net, tmp_path / "control"))
        drawing |= {"control_image": picture(64, 64), "control_scale": 0.8}
        hint = {"image": picture(64, 64), "controlnet_conditioning_scale": 0.8}
        moved = pipe(PROMPT, "dark", steps=4, seed=3, **drawing).latents
        assert error(moved, plain) > 0.01
        xl = "XL" if kind == "sdxl" else ""
        options = {} if xl else {"requires_safety_checker": False}
        cls = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline")
        judge = cls(**judge.components, controlnet=net, **options)
    judge.set_progress_bar_config(disable=True)
    for steps in (1, 4):
        after = pipe(PROMPT, "dark", steps=steps, seed=3, **drawing).latents
        asked = {"num_inference_steps": steps, "guidance_scale": 1.5, "negative_prompt": "dark"}
        size = {"height": 64, "width": 64, "output_type": "latent"}
        assert error(after, judge(**arguments([3], **asked, **size, **hint)).images) < TOLERANCE
    assert error(after, before) > 0.01


@pytest.mark.parametrize("grid", [{"timesteps": [900, 400, 60]}, {"sigmas": [9.0, 3.0, 0.5, 0.0]}])
def test_a_grid_of_ones_own_says_how_many_steps(tiny_folder: Folder, grid: dict[str, Any]) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    drawing = {"sampler": "euler", "size": 64, "output": "latent", **grid}
    result = pipe("a cat", **drawing)
    assert result.settings["steps"] == 3
    assert torch.equal(pipe("a cat", steps=3, **drawing).latents, result.latents)
    with pytest.raises(ValueError, match="steps: expected None or 3 for a grid of one's own"):
        pipe("a cat", steps=4, **drawing)
