"""What a pipeline promises: batches, seeds, sizes, settings, errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_pipelines import mask, picture
from numerics import error
from PIL import Image

from diffusion_fast.engine import Engine
from diffusion_fast.engine.rewrites.decoder import FreshDecoder, PreparedDecoder
from diffusion_fast.pipelines import Result, StableDiffusion

Folder = Callable[[str], Path]
ROUNDING = 1e-5


def draw(pipe: StableDiffusion, prompt: Any = "a cat", **changes: Any) -> Result:
    return pipe(prompt, **{"steps": 3, "output": "latent", "sampler": "ddim", **changes})


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("start", [{}, {"image": picture(64, 64)}])
def test_an_image_does_not_depend_on_its_batch(
    pipe: StableDiffusion, sampler: str, start: dict[str, Any]
) -> None:
    drawing = {"sampler": sampler, "size": 64, **start}
    together = draw(pipe, ["a cat", "a (dog:1.2)"], batch=2, seed=[4, 9, 4, 1], **drawing)
    assert together.seeds == [4, 9, 4, 1]
    alone = [
        draw(pipe, prompt, seed=seed, **drawing).latents
        for prompt, seed in zip(["a cat"] * 2 + ["a (dog:1.2)"] * 2, [4, 9, 4, 1], strict=True)
    ]
    assert error(together.latents, torch.cat(alone)) < ROUNDING
    assert error(together.latents[2], together.latents[0]) > 0.01  # another prompt
    assert error(together.latents[1], together.latents[0]) > 0.01  # another seed


def test_noise_is_bit_for_bit_that_of_the_image_alone(
    pipe: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []
    sample = Engine.sample

    def spy(self: Engine, *args: Any, **kwargs: Any) -> torch.Tensor:
        starts.append(kwargs["x_T"])
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "sample", spy)
    draw(pipe, seed=5, batch=3)
    draw(pipe, seed=6)
    assert torch.equal(starts[0][1], starts[1][0])
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(starts[1][0], expected)


def test_one_engine_serves_all_calls(tiny_folder: Folder) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))
    first = draw(pipe, eta=1.0, guidance_scale=3.0)
    engine = pipe._engine
    draw(pipe, sampler="euler", steps=5, image=picture(), strength=0.5)
    plain = draw(pipe, guidance_scale=3.0)
    assert pipe._engine is engine
    assert error(plain.latents, first.latents) > 0.01  # eta is 0 again
    assert torch.equal(draw(pipe, eta=1.0, guidance_scale=3.0).latents, first.latents)
    pipe.unet = StableDiffusion.from_pretrained(tiny_folder("sd15")).unet
    assert torch.equal(draw(pipe, eta=1.0, guidance_scale=3.0).latents, first.latents)


@pytest.mark.parametrize("size", [8, 64, (24, 72), (104, 40)])
def test_sizes(pipe: StableDiffusion, size: Any) -> None:
    height, width = size if isinstance(size, tuple) else (size, size)
    result = pipe("a cat", steps=1, size=size)
    assert isinstance(result.images[0], Image.Image)
    assert result.images[0].size == (width, height)
    assert result.latents.shape == (1, 4, height // 8, width // 8)


def test_outputs(pipe: StableDiffusion) -> None:
    pictures = pipe("a cat", steps=2)
    tensors = pipe("a cat", steps=2, output="tensor")
    latents = pipe("a cat", steps=2, output="latent")
    assert tensors.images.shape == (1, 3, 64, 64)
    assert tensors.images.abs().max() <= 1
    pixels = np.asarray(pictures.images[0]).transpose(2, 0, 1)
    expected = ((tensors.images[0].numpy() + 1) * 127.5).round()
    assert np.abs(pixels - expected).max() == 0
    assert torch.equal(latents.images, pictures.latents)
    assert (pictures.vae, latents.vae) == ("whole", None)
    assert pictures.flagged is None


def test_settings_say_how_to_make_it_again(pipe: StableDiffusion) -> None:
    result = draw(pipe, ["a", "b"], negative_prompt="c", seed=3, eta=0.5, size=(64, 72))
    settings = json.loads(json.dumps(result.settings))
    prompts = settings.pop("prompt"), settings.pop("negative_prompt")
    size = settings.pop("size")
    again = pipe(*prompts, seed=result.seeds, size=tuple(size), output="latent", **settings)
    assert torch.equal(again.latents, result.latents)


def test_memory_that_runs_out_is_reported(
    pipe: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipe("a cat", steps=1, batch=2, output="tensor")
    decode = FreshDecoder.__call__

    def small(self: FreshDecoder, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return decode(self, latents)

    monkeypatch.setattr(FreshDecoder, "__call__", small)
    result = pipe("a cat", steps=1, batch=2, output="tensor")
    assert result.vae == "sliced"
    assert error(result.images, whole.images) < ROUNDING


def test_the_vae_decodes_with_its_rewrites(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))

    def unscaled(result: Result) -> torch.Tensor:
        return pipe.vae.decode(pipe.vae.unscale(result.latents)).clamp(-1, 1)

    calls: list[torch.Size] = []
    decode = PreparedDecoder.__call__

    def counted(self: PreparedDecoder, latents: torch.Tensor) -> torch.Tensor:
        calls.append(latents.shape)
        return decode(self, latents)

    monkeypatch.setattr(PreparedDecoder, "__call__", counted)
    with torch.no_grad():
        for _ in range(2):
            result = draw(pipe, output="tensor")
            assert error(result.images, unscaled(result)) < ROUNDING
            pipe.vae.decoder.conv_out.weight.mul_(0.5)
        pipe.vae = copy.deepcopy(pipe.vae)
        pipe.vae.decoder.conv_out.weight.mul_(4)
        result = draw(pipe, output="tensor")
        assert error(result.images, unscaled(result)) < ROUNDING
        assert len(calls) == 3


def test_callback_and_progress(pipe: StableDiffusion, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []
    result = draw(pipe, callback=lambda step, t, x: seen.append((step, x)), progress=True)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], result.latents)
    assert "ddim" in capfd.readouterr().err
    draw(pipe)
    assert capfd.readouterr().err == ""


def test_a_call_inside_its_own_is_refused(pipe: StableDiffusion) -> None:
    expected = draw(pipe).images
    with pytest.raises(RuntimeError, match="expected a callback, hook or model that"):
        draw(pipe, callback=lambda *_: draw(pipe))
    assert torch.equal(draw(pipe).images, expected)


def test_a_copy_draws_the_same_and_has_its_own_weights(pipe: StableDiffusion) -> None:
    """Nothing that is derived from weights follows those of the other pipeline."""
    expected = draw(pipe, output="tensor").images
    other = copy.deepcopy(pipe)
    assert torch.equal(draw(other, output="tensor").images, expected)
    for part in (other.unet, other.vae.decoder):
        before = draw(other, output="tensor").images
        with torch.no_grad():
            part.conv_in.weight.mul_(2)
        assert not torch.equal(draw(other, output="tensor").images, before)
        assert torch.equal(draw(pipe, output="tensor").images, expected)


def test_pil_images_are_scaled_to_the_size(pipe: StableDiffusion) -> None:
    small = picture().resize((40, 48), Image.Resampling.LANCZOS)
    ready = draw(pipe, image=small, mask=Image.new("L", (40, 48), 255))
    scaled = draw(pipe, image=picture(), mask=Image.new("L", (80, 64), 255), size=(48, 40))
    assert torch.equal(ready.latents, scaled.latents)


def test_images_and_masks_may_be_tensors(pipe: StableDiffusion) -> None:
    x = torch.from_numpy(np.array(picture(), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    hole = torch.from_numpy(np.array(mask(), dtype=np.float32)) / 255
    result = draw(pipe, image=x, mask=hole)
    assert error(result.latents, draw(pipe, image=picture(), mask=mask()).latents) < ROUNDING
    several = draw(pipe, image=[picture(), picture()], mask=hole[None, None], batch=2)
    assert error(several.latents[:1], result.latents) < ROUNDING


@pytest.mark.parametrize("kind", ["sd15", "inpainting"])
def test_a_latent_pixel_is_drawn_where_a_mask_touches_it(tiny_folder: Folder, kind: str) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder(kind))
    thin = np.zeros((64, 80), np.uint8)
    thin[15, 9] = thin[20:60, 31] = 255  # one pixel, and a line of one pixel
    touched = thin.reshape(8, 8, 10, 8).any((1, 3))
    masks = [thin, np.kron(touched, np.full((8, 8), 255, np.uint8))]
    if kind == "inpainting":  # it sees the mask alone, not the masked picture
        with torch.no_grad():
            pipe.unet.conv_in.weight[:, 5:] = 0
        drawn = [draw(pipe, image=picture(), mask=Image.fromarray(one)).latents for one in masks]
        assert torch.equal(*drawn)
        return
    hole = Image.fromarray(thin)
    cat, dog = (draw(pipe, p, image=picture(), mask=hole).latents for p in ("a cat", "a dog"))
    assert torch.equal((cat != dog).any(1)[0], torch.from_numpy(touched))


def test_thin_lines_of_a_mask_survive_scaling(pipe: StableDiffusion) -> None:
    thin = np.zeros((640, 800), np.uint8)
    thin[:, 333] = 255
    size, hole = (64, 80), Image.fromarray(thin)
    start = {"image": picture(640, 800), "mask": hole, "size": size}
    cat, dog = (draw(pipe, prompt, **start).latents for prompt in ("a cat", "a dog"))
    assert (cat != dog).any(1)[0].any(0).nonzero().flatten().tolist() == [333 // 80]


def test_images_of_other_modes(pipe: StableDiffusion) -> None:
    """16 bits are scaled, transparent is white in an image and black in a mask."""
    grey = np.linspace(0, 255, 64 * 64).round().astype(np.uint8).reshape(64, 64)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    half = np.where(np.arange(64)[:, None] < 32, 255, 0).astype(np.uint8).repeat(64, 1)
    clear = Image.merge("LA", (Image.new("L", (64, 64), 255), Image.fromarray(half)))
    plain = draw(pipe, image=Image.fromarray(grey), mask=Image.fromarray(half)).latents
    assert torch.equal(draw(pipe, image=wide, mask=clear).latents, plain)
    white = draw(pipe, image=Image.new("RGB", (64, 64), "white")).latents
    assert torch.equal(draw(pipe, image=Image.new("RGBA", (64, 64))).latents, white)
    for name in ("image", "mask"):
        pictures = {"image": wide, "mask": wide, name: Image.new("F", (64, 64))}
        with pytest.raises(ValueError, match=f"{name}: can't be read.* mode is 'F'"):
            draw(pipe, **pictures)


def test_an_empty_prompt_is_fine(pipe: StableDiffusion) -> None:
    plain = draw(pipe, "", guidance_scale=1.0)
    assert torch.equal(
        draw(pipe, "", negative_prompt="", guidance_scale=1.0).latents, plain.latents
    )
    assert error(draw(pipe, "", guidance_scale=9.0).latents, plain.latents) < ROUNDING


@pytest.mark.parametrize("scale", [0.0, 1, -2.0, 0.5, [0.0, 1.0, -1.0]])
def test_a_guidance_scale_of_at_most_1_is_the_conditional_model(
    pipe: StableDiffusion, scale: Any
) -> None:
    """So is diffusers', whose call for SDXL Turbo has 0; the negative prompt says nothing."""
    plain = draw(pipe, "a cat", guidance_scale=1.0)
    for negative in (None, "a very " * 60 + "long one"):
        result = draw(pipe, "a cat", negative_prompt=negative, guidance_scale=scale)
        assert torch.equal(result.latents, plain.latents)
    assert not torch.equal(draw(pipe, "a dog", guidance_scale=scale).latents, plain.latents)


def test_cfg_pp_runs_both_halves_at_any_scale(pipe: StableDiffusion) -> None:
    one, other, small = (
        draw(pipe, sampler="euler_cfg_pp", guidance_scale=scale, negative_prompt=negative)
        for scale, negative in ((1.0, ""), (1.0, "blurry"), (0.6, ""))
    )
    assert error(one.latents, other.latents) > 1e-4
    assert error(one.latents, small.latents) > 1e-4
    assert small.settings["guidance_scale"] == 0.6


def test_guidance_for_some_steps(pipe: StableDiffusion) -> None:
    result = draw(pipe, guidance_scale=[7.0, 0.0, 3.0])
    assert torch.equal(result.latents, draw(pipe, guidance_scale=[7.0, 1.0, 3.0]).latents)


def test_numbers_of_numpy(pipe: StableDiffusion) -> None:
    same = {"steps": 2, "batch": 2, "seed": [0, 1], "size": (64, 72), "clip_skip": 1, "eta": 0.5}
    theirs = {
        "steps": np.int64(2),
        "batch": np.int32(2),
        "seed": np.arange(2),
        "size": (np.int64(64), np.int16(72)),
        "clip_skip": np.uint8(1),
        "eta": np.float32(0.5),
    }
    expected = draw(pipe, guidance_scale=5.0, **same)
    result = draw(pipe, guidance_scale=np.float32(5), **theirs)
    assert torch.equal(result.latents, expected.latents)
    assert json.loads(json.dumps(result.settings)) == json.loads(json.dumps(expected.settings))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"image": picture(64, 64)}])
def test_the_default_dtype_is_the_users(
    pipe: StableDiffusion, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    expected = draw(pipe, "a (cat:1.3)", sampler="euler_ancestral", **changes).latents
    torch.set_default_dtype(dtype)
    try:
        found = draw(pipe, "a (cat:1.3)", sampler="euler_ancestral", **changes).latents
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_zero_terminal_snr(tiny_folder: Folder) -> None:
    folder = tiny_folder("sd21")
    pipe = StableDiffusion.from_pretrained(folder, zero_terminal_snr=True)
    assert pipe.scheduler.schedule.alphas_cumprod[-1] == 0
    trailing = {"timestep_spacing": "trailing"}
    other = draw(StableDiffusion.from_pretrained(folder), **trailing)
    assert error(draw(pipe, **trailing).latents, other.latents) > 0.01
    pipe = StableDiffusion.from_pretrained(folder, zero_terminal_snr=False)
    assert torch.equal(draw(pipe, **trailing).latents, other.latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt: expected a string or a list of strings, got None"),
        ({"prompt": ["a", 3]}, "prompt: expected a string or a list of strings"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"negative_prompt": 3}, "negative_prompt: expected a string"),
        ({"prompt": "a AND b"}, "^prompt: expected none .* got 'AND'"),
        ({"negative_prompt": "a AND b"}, "^negative_prompt: expected none of .* got '"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected one, or one for each of 1"),
        ({"steps": 0}, "steps: expected a positive integer, got 0"),
        ({"steps": -3}, "steps: expected a positive integer, got -3"),
        ({"steps": 1001}, r"steps: expected an integer in \[1, 1000\]"),
        ({"batch": 0}, "batch: expected a positive integer"),
        ({"size": 60}, r"size: expected \(height, width\) or one number, .*multiples of 8, got"),
        ({"size": (64, 0)}, "size: expected"),
        ({"size": "64"}, "size: expected"),
        ({"seed": -1}, "seed: expected integers in"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"seed": [1, 2]}, "seed: expected one, or one for each of 1 images, got 2"),
        ({"sampler": "fast"}, "sampler: expected one of ddpm"),
        ({"sampler": 3}, r"sampler: expected a name, got 3 \(int\)"),
        *(
            ({"sampler": sampler, "timestep_spacing": spacing}, f"timestep_spacing: expected {own}")
            for sampler, spacing, own in (
                ("Euler a", "trailing", "'normal' or none beside the sampler 'Euler a', got"),
                ("DPM++ 2M Karras", "exponential", "'karras' or none beside"),
                ("comfyui/euler", "trailing", "'normal' or none beside"),
            )
        ),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected finite"),
        ({"output": "jpg"}, "output: expected one of pil"),
        ({"magic": 1}, "magic: expected one of the keywords"),
        ({"strength": 0.5}, "strength: expected None without image"),
        ({"mask": mask()}, "mask: expected None without image"),
        ({"image": "x.png"}, "image: expected PIL images or a tensor, got str"),
        ({"image": picture(60, 64)}, "image: expected width and height to be multiples of 8"),
        ({"image": torch.zeros(3, 64, 64), "size": 72}, "image: expected the size asked for"),
        ({"image": torch.full((3, 64, 64), float("nan"))}, "image: expected finite numbers"),
        ({"image": torch.zeros(1, 64, 64)}, r"image: expected shape \[3, H, W\]"),
        (
            {"image": torch.full((3, 64, 64), 255.0)},
            r"image: expected values in \[-1, 1\], got 255",
        ),
        ({"image": [picture()] * 2}, "image: expected one, or one for each of 1 images, got 2"),
        ({"image": picture(), "strength": 0.0}, "strength: expected a number in"),
        ({"image": picture(), "strength": 0.1}, "strength: expected at least 1 / steps"),
        ({"image": picture(), "mask": mask(64, 64)}, r"mask: .*image \(80 x 64\), got 64 x 64"),
        ({"image": picture(), "mask": torch.zeros(8, 8)}, "mask: expected the size of the image"),
        ({"image": picture(), "mask": torch.full((64, 80), 3.0)}, r"mask: .*values in \[0, 1\]"),
        ({"image": picture(), "mask": 1}, "mask: expected PIL images or a tensor, got int"),
        ({"image": picture(), "mask": torch.zeros(0, 0)}, r"mask: expected shape \[H, W\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(pipe: StableDiffusion, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        draw(pipe, **arguments)


@pytest.mark.parametrize("given", [{}, {"image": picture()}])
def test_an_inpainting_model_needs_image_and_mask(
    tiny_folder: Folder, given: dict[str, Any]
) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("inpainting"))
    with pytest.raises(ValueError, match="made for inpainting"):
        draw(pipe, **given)


def test_half_precision(tiny_folder: Folder) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sdxl"), dtype=torch.bfloat16)
    result = pipe("a cat", steps=2, output="tensor")
    assert result.images.dtype == torch.float32
    exact = StableDiffusion.from_pretrained(tiny_folder("sdxl"))
    assert error(result.latents, exact("a cat", steps=2).latents) < 0.1
    # The noise of an image's latents is drawn in their dtype, and PyTorch 2.11 has others for each.
    assert pipe("a cat", steps=2, image=picture()).latents.isfinite().all()
    moved = pipe.to(torch.float32)("a cat", steps=2, image=picture())
    assert moved.latents.isfinite().all()
