"""A ControlNet: where it begins, one step beside diffusers' arithmetic, what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from numerics import assert_close, error
from PIL import Image
from safetensors.torch import load_file
from small_runs import SIZES, gradients, randomize, run, write_images
from torch import Tensor
from torch.nn import functional as F

import diffusion_fast as df
from diffusion_fast.finetuning import Settings
from diffusion_fast.models.controlnet import ControlNet

Tiny = Callable[[str], Path]
METHOD = {"method": "controlnet"}


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with conditioning images: one is white where the image's left half is."""
    folder = write_images(tmp_path_factory.mktemp("steered"))
    (folder / "hints").mkdir()
    lines = []
    for i, (width, height) in enumerate(SIZES):
        hint = Image.new("RGB", (width, height))
        hint.paste((255, 255, 255), (0, 0, width // 2, height))
        hint.save(folder / "hints" / f"{i}.png")
        line = {"file_name": f"{i}.png", "text": f"a cat, number {i}"}
        lines.append(json.dumps(line | {"conditioning_image_file_name": f"hints/{i}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_it_begins_as_the_first_half_of_the_unet(
    kind: str, tiny_folder: Tiny, tmp_path: Path
) -> None:
    unet = df.UNet2DCondition.from_pretrained(tiny_folder(kind))
    ControlNet.from_unet(unet).save_pretrained(tmp_path)
    folder = tiny_folder(kind) / "unet"
    theirs = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel.from_pretrained(folder)
    )
    ours = diffusers.ControlNetModel.from_pretrained(tmp_path)
    wanted = {n: v for n, v in theirs.config.items() if not n.startswith("_")}
    found = json.loads((tmp_path / "config.json").read_text())
    assert {n: found[n] for n in wanted} == json.loads(json.dumps(wanted))
    drawn = "controlnet_cond_embedding."
    for name, value in theirs.state_dict().items():
        if not name.startswith(drawn) or name.startswith(f"{drawn}conv_out"):
            assert torch.equal(ours.state_dict()[name], value), name
    assert all(p.any() for n, p in ours.named_parameters() if n.startswith(f"{drawn}conv_in"))


@pytest.mark.parametrize("case", ["sd15", "sd21", "sdxl", "sd15, recomputed"])
def test_loss_and_gradients(case: str, tiny_folder: Tiny, steered: Path, tmp_path: Path) -> None:
    """train_controlnet.py, and for SDXL train_controlnet_sdxl.py."""
    folder = tiny_folder(case.split(",")[0])
    checkpointing = {"gradient_checkpointing": "recomputed" in case}
    ours = run(folder, steered, tmp_path / "out", **METHOD, **checkpointing)
    assert all(name.startswith("controlnet.") for name, _ in ours.network.named_parameters())
    randomize(ours.network)
    start = tmp_path / "start"
    ours.method.control.save_pretrained(start)
    trainer = ours.trainer()
    batch = next(trainer.dataloader.starting_at(0))
    loss = trainer.objective.backward(batch)
    count = len(batch[0])
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (2,), generator=generator)[:count]
    noise = torch.randn((2, *batch[0].shape[1:]), generator=generator)[:count]

    def theirs(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").to(dtype)
        unet.requires_grad_(False)
        control = diffusers.ControlNetModel.from_pretrained(start).to(dtype)
        scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        abar = scheduler.alphas_cumprod.double()[t].to(dtype).view(-1, 1, 1, 1)
        noisy = (abar.sqrt() * batch[0] + (1 - abar).sqrt() * noise).to(dtype)
        context: dict[str, Any] = {name: one.to(dtype) for name, one in batch[1].items()}
        states, hint = context.pop("context"), context.pop("hint")
        added = {"added_cond_kwargs": context or None, "return_dict": False}
        down, mid = control(noisy, t, states, controlnet_cond=hint, **added)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        pred = unet(noisy, t, states, **residuals, **added)[0]
        v = scheduler.config.prediction_type == "v_prediction"
        target = abar.sqrt() * noise - (1 - abar).sqrt() * batch[0] if v else noise
        value = F.mse_loss(pred, target.to(dtype))
        value.backward()
        grads = {f"controlnet.{n}": p.grad for n, p in control.named_parameters()}
        return value.detach(), {n: g for n, g in grads.items() if g is not None}

    (truth, exact), (plain, rounded) = theirs(torch.float64), theirs(torch.float32)
    assert_close(loss, truth, plain)
    own = gradients(ours.network)
    assert own.keys() == exact.keys()
    assert all(grad.any() for grad in own.values())
    joined = [
        torch.cat([(grads[n] / one.abs().max().to(grads[n])).flatten() for n, one in exact.items()])
        for grads in (own, exact, rounded)
    ]
    assert_close(*joined)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_comes_out_steers(
    precision: str, tiny_folder: Tiny, steered: Path, tmp_path: Path
) -> None:
    hint = steered / "hints" / "0.png"
    drawing = {"validation_prompts": ["a cat"], "validation_conditioning": [hint]}
    options = {"steps": 4, "learning_rate": 1e-2, "ema_decay": 0.5, "precision": precision}
    made = run(
        *(tiny_folder("sd15"), steered, tmp_path / "out"),
        **{**METHOD, **options, **drawing},
        validation_steps=2,
        validation_every=2,
        checkpoint_every=2,
    )
    trainer = made.trainer()
    callbacks = list(made._callbacks(trainer, 0))
    trainer.fit(4, callbacks)
    made.write(trainer.weights())
    assert made.files() == [
        tmp_path / "out" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")
    ]
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "out")
    averages = trainer.weights()
    for name, value in load_file(made.files()[1]).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, averages[f"controlnet.{name}"])
        assert torch.equal(theirs.state_dict()[name], value)
    assert not torch.equal(averages["controlnet.conv_in.weight"], made.parts.unet.conv_in.weight)
    pipe = df.StableDiffusion.from_pretrained(tiny_folder("sd15"))

    def latents(**more: Any) -> Tensor:
        drawn = pipe("a cat", steps=3, output="latent", seed=1, size=64, **more).images
        assert isinstance(drawn, Tensor)
        return drawn

    plain = latents()
    pipe.load_control(tmp_path / "out")
    with Image.open(hint) as picture:
        white = Image.new("RGB", picture.size, "white")
        assert error(latents(control_image=picture.copy()), plain) > 1e-3
        assert not torch.equal(latents(control_image=picture.copy()), latents(control_image=white))
    names = {path.name for path in (tmp_path / "out" / "samples").iterdir()}
    assert names == {"step_00000002.png", "step_00000004.png"}


@pytest.mark.parametrize("options", [{"flip": True}, {"flip": True, "random_crop": True}])
def test_hints_go_with_their_images(
    options: dict[str, Any], tiny_folder: Tiny, tmp_path: Path
) -> None:
    """Cut and mirrored alike: here each image is its own hint."""
    folder = write_images(tmp_path / "images", ((96, 48), (90, 130)))
    hints = shutil.copytree(folder, tmp_path / "hints")
    made = run(
        *(tiny_folder("sd15"), folder, tmp_path / "out"), **METHOD, **options, conditioning=hints
    )
    made.data.examples[:] = [e for e in made.data.examples for _ in range(4)]
    vae = made.parts.vae
    for x_0, context in map(made.trainer().dataloader.dataset.__getitem__, range(8)):
        hint = context["hint"]
        assert 0 <= hint.min() < 0.2 < 0.8 < hint.max() <= 1
        if "random_crop" in options:
            assert error(2 * hint - 1, x_0) < 1e-6
        else:
            with torch.no_grad():
                latents = vae.scale(vae.encode((2 * hint - 1)[None]).mode())[0]
            assert error(latents, x_0) < 1e-4


def test_conditioning_that_can_not_be(tiny_folder: Tiny, steered: Path, tmp_path: Path) -> None:
    model, hints = tiny_folder("sd15"), steered / "hints"
    assert len(run(model, steered, tmp_path / "out", **METHOD).data.examples) == len(SIZES)
    # With another method, what conditions is no picture to train on.
    assert len(run(model, steered, tmp_path / "out").data.examples) == len(SIZES)
    plain = write_images(tmp_path / "plain")

    def refused(match: str, data: Path = plain, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as found:
            run(model, data, tmp_path / "out", **METHOD | changes)
        assert "\n" not in str(found.value)

    refused(
        r"^conditioning: expected a conditioning image for each image, in metadata.jsonl, got 5"
    )
    refused(r"^conditioning: expected a folder, got .*none, which is none$", conditioning="none")
    part = write_images(tmp_path / "part", SIZES[:4])
    refused(r"^conditioning: .*, got 1 without: .*4\.png$", conditioning=part)
    Image.new("RGB", (64, 99)).save(part / "4.png")
    refused(r"part.4\.png: expected the shape of .*plain.4\.png \(130 x 90\)", conditioning=part)
    (part / "4.png").write_bytes(b"<html>")
    refused(r"part.4\.png: can't be read as an image: it is a web page", conditioning=part)
    with pytest.warns(UserWarning, match=r"4\.png: .*; skipped"):
        found = run(model, plain, tmp_path / "out", **METHOD, conditioning=part, broken="skip")
    assert len(found.data.examples) == 4
    (part / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a", "conditioning_image": "x.png"}'
    )
    refused(r"line 1: expected a conditioning image that is there, got 'x.png'$", part)
    least = {"model": model, "data": plain, "out": tmp_path / "out", "method": "controlnet"}
    for changes, match in (
        ({"method": "lora", "conditioning": hints}, "^conditioning: expected none, because the me"),
        ({"train_text": True}, "^train_text: expected False, because only a ControlNet is"),
        ({"class_prompt": "a cat"}, "^class_prompt: expected none, because class images have no"),
        ({"validation_prompts": "a"}, "^validation_conditioning: expected one for each of 1 pro"),
    ):
        with pytest.raises(ValueError, match=match):
            Settings.of(least | changes)
