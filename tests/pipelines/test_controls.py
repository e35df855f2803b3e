"""ControlNets and T2I-Adapters in a pipeline: latents of diffusers' pipelines, and bad input."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from command_line import run
from control_parity import HINT, adapter, controlnet, saved
from diffusers_pipelines import GUIDANCE, NEGATIVE, PROMPT, arguments, mask, picture, theirs
from numerics import error
from PIL import Image
from torch import Tensor

from diffusion_fast.files import CheckpointError
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.models.t2i_adapter import T2IAdapter
from diffusion_fast.pipelines import StableDiffusion

TOLERANCE = 1e-4  # of max|latents|; about 1e-6 is seen
Folder = Callable[[str], Path]


_FIELDS = inspect.signature(diffusers.ControlNetModel.__init__).parameters.keys()
EXTRA: dict[str, dict[str, Any]] = {"pooled": {"global_pool_conditions": True}}


def hint(seed: int = 0, height: int = 64, width: int = 80) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def control_folder(
    tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Networks for the tiny models, each made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, name: str) -> Path:
        key = kind, name
        if key not in made:
            out = tmp_path_factory.mktemp("control") / f"{kind}-{name}"
            config = json.loads((tiny_folder(kind) / "unet" / "config.json").read_text())
            config |= {"in_channels": 4, "conditioning_embedding_out_channels": HINT}
            shape = {n: v for n, v in config.items() if n in _FIELDS}
            if name.startswith("adapter"):
                shape = {"channels": (16, 32), "num_res_blocks": 1}
                if kind == "sdxl":
                    shape |= {"adapter_type": "full_adapter_xl", "downscale_factor": 16}
                model = adapter({**shape, **EXTRA.get(name, {})}, len(made))
            else:
                model = controlnet({**shape, **EXTRA.get(name, {})}, len(made))
            made[key] = saved(model, out)
        return made[key]

    return folder


class Case:
    """What both pipelines are asked for.

    Args:
        kind: of the tiny model.
        names: of the networks.
        task: ``""``, ``"Img2Img"`` or ``"Inpaint"``.
        pictures: image, mask and strength, as ours takes them.
        options: of the networks, as ours takes them.
    """

    def __init__(
        self, kind: str, names: list[str], task: str = "", sampler: str = "ddim", **options: Any
    ) -> None:
        self.kind, self.names, self.task, self.sampler = kind, names, task, sampler
        self.pictures: dict[str, Any] = {}
        if task:
            self.pictures = {"image": picture(), "strength": 0.8}
        if task == "Inpaint":
            self.pictures |= {"mask": mask(), "strength": 1.0}
        self.options = options
        self.hints = [hint(i) for i in range(len(names))]

    def ours(self, pipe: StableDiffusion, steps: int, **changes: Any) -> Tensor:
        given = {"control_image": self.hints, **self.options, **self.pictures, **changes}
        drawing = {"guidance_scale": GUIDANCE, "sampler": self.sampler, "output": "latent"}
        return pipe(
            PROMPT, NEGATIVE, steps=steps, batch=self.batch, seed=3, **drawing, **given
        ).latents

    @property
    def batch(self) -> int:
        return 1 if self.task == "Inpaint" else 2

    def theirs(self, folder: Path, networks: list[Any]) -> Callable[[int], Tensor]:
        plain, xl = theirs(folder, self.sampler), "XL" if self.kind == "sdxl" else ""
        options: dict[str, Any] = {} if xl else {"requires_safety_checker": False}
        several = len(networks) > 1
        adapters = self.names[0].startswith("adapter")
        if adapters:
            part: Any = diffusers.MultiAdapter(networks) if several else networks[0]
            cls = getattr(diffusers, f"StableDiffusion{xl}AdapterPipeline")
            parts = {n: v for n, v in plain.components.items() if xl or n != "image_encoder"}
            pipe = cls(**parts, adapter=part, **options)
        else:
            part = diffusers.MultiControlNetModel(networks) if several else networks[0]
            cls = getattr(diffusers, f"StableDiffusion{xl}ControlNet{self.task}Pipeline")
            pipe = cls(**plain.components, controlnet=part, **options)
        pipe.set_progress_bar_config(disable=True)
        names = {
            "control_scale": "adapter_conditioning_scale"
            if adapters
            else "controlnet_conditioning_scale",
            "control_start": "control_guidance_start",
            "control_end": "control_guidance_end",
            "guess_mode": "guess_mode",
        }
        given = {names[name]: value for name, value in self.options.items()}
        hints = self.hints if several else self.hints[0]
        given["control_image" if self.task else "image"] = hints
        if self.task:
            given |= {"image": self.pictures["image"], "strength": self.pictures["strength"]}
        if self.task == "Inpaint":
            given |= {"mask_image": self.pictures["mask"]}
        if not self.task or self.task == "Inpaint":
            given |= {"height": 64, "width": 80}

        def latents(steps: int) -> Tensor:
            if steps == 1:  # at the first level, which leading spacing is not
                config, spacing = pipe.scheduler.config, {"timestep_spacing": "trailing"}
                pipe.scheduler = type(pipe.scheduler).from_config(config, **spacing)
            seeds = list(range(3, 3 + self.batch))
            drawing = arguments(seeds, num_inference_steps=steps, output_type="latent", **given)
            return pipe(**drawing).images

        return latents


WINDOW = {"control_scale": 0.7, "control_start": 0.25, "control_end": 0.75}
TWO = {"control_scale": [0.8, 0.5], "control_start": [0.0, 0.5], "control_end": [0.75, 1.0]}
CASES = {
    "sd15": Case("sd15", ["a"]),
    "sd21": Case("sd21", ["a"], control_scale=0.6),
    "sdxl": Case("sdxl", ["a"], sampler="euler"),
    "window": Case("sd15", ["a"], sampler="euler", **WINDOW),
    "guess mode": Case("sd15", ["a"], guess_mode=True, control_scale=0.9),
    "guess mode of sdxl": Case("sdxl", ["a"], guess_mode=True),
    "pooled": Case("sd15", ["pooled"]),
    "two": Case("sd15", ["a", "b"], sampler="dpmpp_2m", **TWO),
    "two of sdxl": Case("sdxl", ["a", "b"], **TWO),
    "image to image": Case("sd15", ["a"], "Img2Img", control_scale=0.9),
    "image to image of sdxl": Case("sdxl", ["a", "b"], "Img2Img", **TWO),
    "inpainting": Case("sd15", ["a"], "Inpaint", control_scale=0.9),
    "inpainting model": Case("inpainting", ["a"], "Inpaint", control_scale=0.8),
    "adapter": Case("sd15", ["adapter"], control_scale=0.6),
    "two adapters": Case("sd15", ["adapter", "adapter2"], control_scale=[0.6, 0.9]),
    "adapter of sdxl": Case("sdxl", ["adapter"], control_scale=0.6),
}


def read(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
def test_latents(name: str, tiny_folder: Folder, control_folder: Callable[..., Path]) -> None:
    case = CASES[name]
    folders = [control_folder(case.kind, one) for one in case.names]
    pipe = StableDiffusion.from_pretrained(tiny_folder(case.kind))
    bare = pipe(
        PROMPT,
        NEGATIVE,
        steps=4,
        guidance_scale=GUIDANCE,
        sampler=case.sampler,
        batch=case.batch,
        seed=3,
        size=(64, 80),
        output="latent",
        **case.pictures,
    ).latents
    for i, folder in enumerate(folders):
        pipe.load_control(folder, f"number {i}")
    judge = case.theirs(tiny_folder(case.kind), [read(folder) for folder in folders])
    four = case.ours(pipe, 4)
    assert error(four, bare) > 0.01  # the networks move the latents
    assert error(four, judge(4)) < TOLERANCE
    further = (20,) * (name in ("sd15", "two of sdxl", "inpainting", "two adapters"))
    further += (1,) * (case.sampler == "ddim" and case.task != "Img2Img")
    for steps in further:
        assert error(case.ours(pipe, steps), judge(steps)) < TOLERANCE


@pytest.fixture
def steered(tiny_folder: Folder, control_folder: Callable[..., Path]) -> StableDiffusion:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    pipe.load_control(control_folder("sd15", "a"), "a")
    pipe.load_control(control_folder("sd15", "b"), "b")
    return pipe


def draw(pipe: StableDiffusion, images: Any = None, **options: Any) -> Tensor:
    images = [hint(0), hint(1)] if images is None else images
    return pipe("a cat", steps=2, control_image=images, output="latent", **options).latents


def test_with_loras(
    tiny_folder: Folder, control_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One that is put on and taken off between two calls."""
    from test_loras import write_lora

    folder, case = tiny_folder("sd15"), CASES["sd15"]
    file = write_lora(folder, tmp_path / "lora.safetensors", 1)
    pipe = StableDiffusion.from_pretrained(folder)
    pipe.load_control(control_folder("sd15", "a"), "a")
    before = case.ours(pipe, 4)
    pipe.loras.load(file, "lora", 0.8)
    result = case.ours(pipe, 4)
    assert error(result, before) > 0.01
    judge = theirs(folder, "ddim")
    judge.load_lora_weights(tmp_path, weight_name=file.name)
    judge.fuse_lora(lora_scale=0.8)
    net = read(control_folder("sd15", "a"))
    pipeline = diffusers.StableDiffusionControlNetPipeline
    judge = pipeline(**judge.components, controlnet=net, requires_safety_checker=False)
    judge.set_progress_bar_config(disable=True)
    given = {"image": hint(0), "height": 64, "width": 80, "output_type": "latent"}
    expected = judge(**arguments([3, 4], num_inference_steps=4, **given)).images
    assert error(result, expected) < TOLERANCE
    pipe.loras.set()
    assert torch.equal(case.ours(pipe, 4), before)


def test_an_adapter_in_its_own_layout(tiny_folder: Folder, tmp_path: Path) -> None:
    """A file is known by what is in it."""
    from test_t2i_adapter_file import own_layout

    shape = {"channels": [16, 32], "num_res_blocks": 1, "adapter_type": "light_adapter"}
    model, found = adapter(shape), []
    torch.save(own_layout(model), tmp_path / "light.pth")
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    down, up = ["CrossAttnDownBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2
    config = dataclasses.replace(
        pipe.unet.config,
        block_out_channels=(16, 32, 32),
        down_block_types=(*down, "DownBlock2D"),
        up_block_types=("UpBlock2D", *up),
    )
    pipe.unet = UNet2DCondition(config)  # a level more: the adapter's last features are its
    for path in (tmp_path / "light.pth", saved(model, tmp_path / "folder")):
        name = pipe.load_control(path)
        found.append(pipe.controls.networks[0])
        pipe.controls.unload(name)
    own, known = (network.state_dict() for network in found)
    assert isinstance(found[0], T2IAdapter)
    assert own.keys() == known.keys()
    assert all(torch.equal(value, known[name]) for name, value in own.items())


def test_calls_differ_by_what_they_ask(steered: StableDiffusion) -> None:
    """One prepared network serves all of them, and a hint for each image."""
    first = draw(steered)
    assert first.shape[2:] == (8, 10)  # of the first hint
    network = next(iter(steered._engine._predictors.values()))  # type: ignore[union-attr]
    for options in ({"control_scale": 0.3}, {"control_end": 0.5}, {"images": [hint(2), hint(1)]}):
        assert error(draw(steered, **options), first) > 1e-4
        assert network in steered._engine._predictors.values()  # type: ignore[union-attr]
    assert torch.equal(draw(steered), first)
    off = draw(steered, control_scale=0.0)
    stack = torch.stack([torch.from_numpy(np.array(hint(i))) / 255 for i in (0, 2)])
    several = draw(steered, [stack.permute(0, 3, 1, 2), hint(1)], batch=2)
    assert error(several[:1], first) < TOLERANCE
    assert error(several[1:], first) > 1e-3
    for name in list(steered.controls.names):
        steered.controls.unload(name)
    bare = steered("a cat", steps=2, size=(64, 80), output="latent").latents
    assert error(bare, off) < 1e-5


def test_the_definition_and_the_rewrites_draw_the_same(
    tiny_folder: Folder, control_folder: Callable[..., Path]
) -> None:
    drawn = []
    for rewrites in ("all", "none"):
        pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"), rewrites=rewrites)
        pipe.load_control(control_folder("sd15", "a"), "a")
        drawn.append(draw(pipe, hint(0), guess_mode=True))
    assert error(drawn[0], drawn[1]) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": hint(0)}, "control_image: expected an image for each of 2 controls"),
        ({"images": ["a", "b"]}, "control_image: expected PIL images or a tensor, got str"),
        ({"images": [hint(0), torch.rand(3, 8, 8)]}, "control_image: expected the size asked for"),
        ({"images": [hint(0), torch.rand(1, 8, 8)]}, "control_image: expected shape"),
        ({"images": [hint(0), torch.rand(3, 64, 80) + 1]}, r"control_image: expected values in"),
        ({"images": [hint(0), torch.rand(3, 3, 64, 80)]}, "control_image: expected one, or one"),
        ({"control_scale": [1.0]}, "control_scale: expected one number, or one for each of 2"),
        ({"control_scale": float("nan")}, "control_scale"),
        ({"control_start": -0.1}, r"control_start: expected numbers in \[0, 1\]"),
        ({"control_start": 0.6, "control_end": 0.5}, "control_start: expected less than"),
        ({"control_end": [0.5] * 3}, "control_end: expected one number"),
        ({"guess_mode": 1}, "guess_mode: expected True or False"),
    ],
)
def test_bad_input(steered: StableDiffusion, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        draw(steered, **options)


def test_more_bad_input(
    steered: StableDiffusion, control_folder: Callable[..., Path], tmp_path: Path
) -> None:
    names = steered.controls.names
    with pytest.raises(ValueError, match=r"control_image: expected an image for a, b \(or"):
        steered("a cat", steps=2)
    with pytest.raises(ValueError, match=r"name: expected one that isn't taken"):
        steered.load_control(control_folder("sd15", "a"), "a")
    with pytest.raises(CheckpointError, match="control: expected a ControlNet for this U-Net"):
        steered.load_control(control_folder("sdxl", "a"))
    with pytest.raises(CheckpointError, match="no such file"):
        steered.load_control(tmp_path / "nothing")
    with pytest.raises(ValueError, match="name"):
        steered.controls.unload("c")
    assert steered.controls.names == names
    for name in names:
        steered.controls.unload(name)
    with pytest.raises(ValueError, match="control_image: expected None without a control"):
        draw(steered, hint(0))
    steered.load_control(control_folder("sd15", "adapter"))
    with pytest.raises(ValueError, match="guess_mode: expected False without a ControlNet"):
        draw(steered, hint(0), guess_mode=True)


def test_on_the_command_line(
    tiny_folder: Folder, control_folder: Callable[..., Path], tmp_path: Path
) -> None:
    hint(0).save(tmp_path / "hint.png")
    common = ["sample", "a cat", "--model", tiny_folder("sd15"), "--steps", 2, "--size", "80x64"]
    control = ["--control", control_folder("sd15", "a"), "--control-image", tmp_path / "hint.png"]

    def drawn(name: str, *options: Any) -> Any:
        out = tmp_path / f"{name}.png"
        done = run(*common, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        return np.asarray(Image.open(out))

    bare, full = drawn("bare"), drawn("full", *control)
    part = drawn("part", *control, "--control-scale", "0.5", "--control-end", "0.5", "--guess-mode")
    assert (bare != full).any()
    assert (part != full).any()
    again = tmp_path / "again.png"
    assert run("sample", "--again", tmp_path / "part.png", "-o", again).returncode == 0
    assert again.read_bytes() == (tmp_path / "part.png").read_bytes()
    for options, message in (
        (control[:2], "--control-image: expected one for each --control"),
        ([*control, "--control-scale", "much"], "--control-scale: expected numbers"),
        ([*control, "--control-scale", "1,2"], "--control-scale: expected one number"),
        (["--control", "nowhere", *control[2:]], "--control: nowhere"),
    ):
        done = run(*common, "-o", tmp_path / "x.png", *options)
        assert done.returncode == 1
        assert message in done.stderr
