"""``diffusion-fast sample`` with a Stable Diffusion model: the tiny one, in seconds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Done, run
from PIL import Image
from safetensors.torch import save_file

from diffusion_fast.images import BETWEEN, LINE, read_settings, save_picture
from diffusion_fast.pipelines import StableDiffusion, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("sample") / "tiny")


def sample(model: Any, out: Path, *arguments: object) -> Done:
    return run("sample", "--model", model, "-o", out, *arguments)


def settings_after(done: Done, out: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout
    return read_settings(out)


def test_a_prompt(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    done = sample(tiny, out, "a cat", "--steps", 2, "--size", "72x64", "--seed", 3)
    settings = settings_after(done, out)
    assert (settings["model"], settings["prompt"]) == (str(tiny), ["a cat"])
    assert settings["seeds"] == [3]
    pipe = StableDiffusion.from_pretrained(tiny)
    expected = pipe("a cat", steps=2, size=(64, 72), seed=3).images[0]
    picture = Image.open(out)
    assert picture.size == (72, 64)
    assert isinstance(expected, Image.Image)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_the_tiny_model_says_that_its_weights_are_random(tmp_path: Path) -> None:
    done = sample("tiny", tmp_path / "x.png", "a cat", "--steps", 1)
    settings = settings_after(done, tmp_path / "x.png")
    assert "tiny: random weights" in done.stderr
    assert settings["weights"] == "random"


def cells(out: Path, columns: int, heading: int = 0) -> list[bytes]:
    """The 64 x 64 images of a grid, in reading order."""
    pixels = np.asarray(Image.open(out))[heading:]
    assert pixels.shape[1] == columns * 66 + 2
    rows = pixels.shape[0] // 66
    assert (pixels[:2] == BETWEEN).all()
    return [
        pixels[2 + 66 * i : 66 + 66 * i, 2 + 66 * k : 66 + 66 * k].tobytes()
        for i in range(rows)
        for k in range(columns)
    ]


def alone(tiny: Path, out: Path, *arguments: object) -> bytes:
    settings_after(sample(tiny, out, *arguments), out)
    return np.asarray(Image.open(out)).tobytes()


def close(grid: Sequence[bytes], single: bytes) -> list[bool]:
    """Which images of a grid are one made alone, to a level: batches round differently."""
    image = np.frombuffer(single, np.uint8).astype(int)
    return [bool(np.abs(np.frombuffer(c, np.uint8) - image).max() <= 1) for c in grid]


def test_prompts_and_seeds_in_a_grid(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    done = sample(tiny, out, "a cat", "a dog", "--batch", 3, "--steps", 2, "--seed", 5)
    assert settings_after(done, out)["seeds"] == [5, 6, 7, 8, 9, 10]
    grid = cells(out, columns=3)
    last = alone(tiny, tmp_path / "one.png", "a dog", "--steps", 2, "--seed", 9)
    assert close(grid, last) == [False] * 4 + [True, False]


@pytest.mark.parametrize(
    ("option", "values"), [("--guidance", ["1", "2.5", "7"]), ("--steps", ["1", "3"])]
)
def test_a_sweep_is_one_grid(tiny: Path, tmp_path: Path, option: str, values: list[str]) -> None:
    out = tmp_path / "sweep.png"
    fixed = ("--steps", 2) if option == "--guidance" else ()
    sweep = ("a cat", "a dog", *fixed, option, ",".join(values))
    settings_after(sample(tiny, out, *sweep), out)
    grid = cells(out, columns=len(values), heading=LINE)
    top = np.asarray(Image.open(out))[:LINE]
    assert (top > 200).any()  # the headings
    expected = [(prompt, value) for prompt in ("a cat", "a dog") for value in values]
    for i, (prompt, value) in enumerate(expected):
        seed = ("--seed", int(prompt == "a dog"))  # a row for each image
        single = alone(tiny, tmp_path / "one.png", prompt, *fixed, option, value, *seed)
        assert close(grid, single) == [k == i for k in range(len(expected))]


@pytest.mark.parametrize(
    "arguments",
    [
        ("a (cat:1.3)", "--steps", "2,3", "--negative", "dark", "--sampler", "euler_ancestral"),
        ("a", "b", "--steps", 2, "--batch", 2, "--sampler", "ddim", "--eta", 0.5, "--seed", 4),
        ("", "--steps", 2, "--spacing", "trailing", "--dtype", "bfloat16"),
        ("a [cat:dog:0.5]", "--sampler", "euler", "--timesteps", "900,300", "--s-churn", 1.0),
    ],
)
def test_again_makes_the_same_file(
    tiny: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    settings_after(sample(tiny, first, *arguments), first)
    settings_after(run("sample", "--again", first, "-o", second), second)
    assert first.read_bytes() == second.read_bytes()


def test_prompts_that_change(tiny: Path, tmp_path: Path) -> None:
    """As the pipeline draws them, and as none of the prompts that take turns."""
    fixed = ("--steps", 4, "--size", 64, "--guidance", 30)
    prompts = ["a [cat:dog:0.5]", "a [cat|dog]", "a cat", "a dog"]
    pictures = [alone(tiny, tmp_path / f"{i}.png", one, *fixed) for i, one in enumerate(prompts)]
    pipe = StableDiffusion.from_pretrained(tiny)
    for prompt, picture in zip(prompts[:2], pictures, strict=False):
        result = pipe(prompt, steps=4, size=64, guidance_scale=30)
        assert close([np.asarray(result.images[0]).tobytes()], picture) == [True]
        assert close(pictures[2:], picture) == [False, False]


def test_a_grid_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    fixed = ("--size", 64, "--sampler", "euler")
    grid = alone(tiny, tmp_path / "x.png", "a cat", *fixed, "--timesteps", "900,400,60")
    pipe = StableDiffusion.from_pretrained(tiny)
    [expected] = pipe("a cat", size=64, sampler="euler", timesteps=[900, 400, 60]).images
    assert close([np.asarray(expected).tobytes()], grid) == [True]
    result = sample(tiny, tmp_path / "y.png", "a cat", *fixed, "--sigmas", "1,2")
    assert "--sigmas: expected at least 2 decreasing numbers" in result.stderr


def test_again_with_files(tiny: Path, tmp_path: Path) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.linear_gradient("L").resize((64, 72)).save(image)
    Image.radial_gradient("L").resize((64, 72)).save(mask)
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    files = ("--image", image, "--mask", mask, "--strength", 0.7)
    settings = settings_after(sample(tiny, first, "a cat", "--steps", 3, *files), first)
    assert set(settings["digests"]) == {"image", "mask"}
    settings_after(run("sample", "--again", first, "-o", second), second)
    assert first.read_bytes() == second.read_bytes()
    Image.new("L", (64, 72), 255).save(mask)
    done = run("sample", "--again", first, "-o", tmp_path / "third.png")
    assert "error: --mask: expected" in done.stderr
    assert "got another file" in done.stderr
    assert not (tmp_path / "third.png").exists()


def test_a_photo_is_turned_upright(tiny: Path, tmp_path: Path) -> None:
    upright = Image.linear_gradient("L").resize((64, 72))
    upright.save(tmp_path / "upright.png")
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it clockwise
    lying.save(tmp_path / "lying.png", exif=exif)
    pixels = [
        alone(tiny, tmp_path / "out.png", "a", "--steps", 2, "--image", tmp_path / name)
        for name in ("upright.png", "lying.png")
    ]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a picture of `sample --out`"),
        ({"kind": "prompts"}, "a picture of `sample --out`"),
        ({"kind": ["prompts"], "model": "tiny"}, "a picture of `sample --out`"),
        ({"kind": "prompts", "model": "tiny", "prompt": ["a"], "steps": 3}, "got steps=3"),
        ({"kind": "prompts", "model": "tiny", "prompt": 3}, "got prompt=3"),
    ],
)
def test_again_with_edited_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_picture(Image.new("L", (8, 8)), tmp_path / "edited.png", settings)
    done = run("sample", "--again", tmp_path / "edited.png", "-o", tmp_path / "x.png")
    assert done.returncode == 1
    assert "error: --again: expected " in done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_settings_of_pictures_that_are_passed_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.jpg"
    private = shutil.copytree(tiny, tmp_path / "private" / "v1.5")
    arguments = ("a cat", "--negative", "blurry", "--steps", 2, "--seed", 7)
    assert settings_after(sample(private, out, *arguments), out)["seed"] == 7
    settings_after(run("sample", "--again", out, "-o", tmp_path / "x.png"), tmp_path / "x.png")
    text = Image.open(tmp_path / "x.png").info["parameters"]
    assert text.startswith("a cat\nNegative prompt: blurry\nSteps: 2, Sampler: DPM++ 2M, CFG scale")
    assert "Seed: 7, Size: 64x64, Model: v1.5, " in text
    assert "private" not in text
    for name in ("x.png", "x.jpg"):
        done = sample(private, tmp_path / name, *arguments, "--no-metadata")
        assert done.returncode == 0, done.stderr
        data = (tmp_path / name).read_bytes()
        assert not any(word in data for word in (b"private", b"blurry", b"Steps"))
    many = ("--out-dir", tmp_path / "many", "--no-metadata")
    assert (
        "error: --no-metadata: expected no --out-dir"
        in run("sample", "--model", tiny, *many).stderr
    )


def test_options_that_change_what_is_drawn(tiny: Path, tmp_path: Path) -> None:
    pipe = StableDiffusion.from_pretrained(tiny)
    call = {"clip_skip": 1, "guidance_rescale": 0.5, "guidance_interval": (0.1, 9.0)}
    call |= {"steps_offset": 0, "final_alpha": "first", "guidance_scale": 5.0, "steps": 3}
    expected = np.asarray(pipe("a", **call).images[0]).tobytes()
    options = "--clip-skip 1 --guidance-rescale 0.5 --guidance-interval 0.1,9 --steps-offset 0"
    options += " --final-alpha first --guidance 5 --steps 3 --no-safety-checker --rewrites none"
    assert close([alone(tiny, tmp_path / "x.png", "a", *options.split())], expected) == [True]
    plain = alone(tiny, tmp_path / "x.png", "a", "--steps", 2, "--guidance", 1)
    assert alone(tiny, tmp_path / "x.png", "a", "--steps", 2, "--guidance", 0) == plain


@pytest.mark.parametrize(
    "name", ["style.safetensors", "rank=8.safetensors", "a=0.5", "стиль:1=x.st"]
)
def test_a_lora_with_and_without_a_scale(tiny: Path, tmp_path: Path, name: str) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.manual_seed(0)
    pair = {
        f"{layer}.lora_A.weight": torch.randn(2, 16),
        f"{layer}.lora_B.weight": torch.randn(16, 2),
    }
    save_file(pair, tmp_path / name)
    pipe = StableDiffusion.from_pretrained(tiny)
    pipe.loras.load(tmp_path / name, "style")
    for end, scale in (("", 1.0), ("=0.25", 0.25)):
        pipe.loras.set({"style": scale})
        expected = np.asarray(pipe("a", steps=2).images[0]).tobytes()
        lora = f"{tmp_path / name}{end}"
        assert alone(tiny, tmp_path / "x.png", "a", "--steps", 2, "--lora", lora) == expected
    for scale, message in (
        ("nan", "scale: expected a finite number"),
        ("x", "expected a file, or"),
    ):
        done = sample(tiny, tmp_path / "y.png", "a", "--lora", f"{tmp_path / name}={scale}")
        assert f"error: --lora: {message}" in done.stderr


@pytest.mark.parametrize("end", ["", "=style"])
def test_an_embedding(tiny: Path, tmp_path: Path, end: str) -> None:
    vectors, file = torch.randn(2, 32), tmp_path / ("style.pt" if not end else "a=b.pt")
    torch.save({"emb_params": vectors}, file)
    pipe = StableDiffusion.from_pretrained(tiny)
    pipe.embeddings.load(file, "style")
    expected = np.asarray(pipe("a (style:1.2)", steps=2).images[0]).tobytes()
    drawing = ("a (style:1.2)", "--steps", 2, "--embedding", f"{file}{end}")
    assert alone(tiny, tmp_path / "x.png", *drawing) == expected
    done = run("sample", "--again", tmp_path / "x.png", "-o", tmp_path / "y.png")
    assert done.returncode == 0, done.stderr
    done = sample(tiny, tmp_path / "y.png", "embedding:style")
    assert "got 'embedding:style'" in done.stderr
    assert "--embedding FILE=NAME" in done.stderr


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = sample(tmp_path / "empty", tmp_path / "x.png", "a")
    assert "not a Stable Diffusion model, it has no model_index.json" in done.stderr


def test_what_the_model_predicts(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    plain = alone(tiny, out, "a", "--steps", 2)
    v = alone(tiny, out, "a", "--steps", 2, "--prediction-type", "v_prediction")
    assert v != plain
    assert read_settings(out)["prediction_type"] == "v_prediction"


def test_many_files_of_a_list_of_prompts(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    out = tmp_path / "many"
    arguments = ("--prompts", prompts, "--batch", 2, "--steps", 1, "--seed", 3)
    done = run("sample", "--model", tiny, "--out-dir", out, *arguments)
    assert done.returncode == 0, done.stderr
    files = sorted(out.iterdir())
    found = [(read_settings(file)["prompt"], read_settings(file)["seed"]) for file in files]
    assert found == [("a cat", 3), ("a cat", 4), ("a dog", 5), ("a dog", 6)]
    single = alone(tiny, tmp_path / "one.png", "a dog", "--steps", 1, "--seed", 5)
    assert np.asarray(Image.open(files[2])).tobytes() == single
    settings_after(run("sample", "--again", files[2], "-o", tmp_path / "2.png"), tmp_path / "2.png")
    assert np.asarray(Image.open(tmp_path / "2.png")).tobytes() == single


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "PROMPT: expected what to draw"),
        (("a", "--steps", "0"), "error: --steps: expected a positive integer, got 0"),
        (("a", "--steps", "-2"), "error: --steps: expected a positive integer, got -2"),
        (("a", "--steps", "many"), "--steps: expected whole numbers such as 5 or 5,10,20"),
        (("a", "--guidance", "1,x"), "--guidance: expected numbers"),
        (("a", "--guidance", "1,2", "--steps", "3,4"), "a list for one of them, got two lists"),
        (("a", "--size", "100"), "multiples of 8, got (100, 100)"),
        (("a", "--size", "64x64x3"), "--size: expected WIDTHxHEIGHT"),
        (("a", "--size", "\u00b2"), "--size: expected WIDTHxHEIGHT"),
        (("a", "--prediction-type", "x"), "error: --prediction-type: expected one of epsilon"),
        (("a", "--sampler", "fast"), "error: --sampler: expected one of ddpm"),
        (("a", "--spacing", "even"), "error: --spacing: expected one of leading"),
        (("a", "--guidance", "nan"), "error: --guidance: expected finite"),
        (("a", "--clip-skip", "9"), "error: --clip-skip: expected an integer in"),
        (("a", "--negative", "b AND c"), "error: --negative: expected none"),
        (("a", "--guidance-interval", "1,x"), "error: --guidance-interval: expected numbers"),
        (("a", "--guidance-rescale", "2"), "error: --guidance-rescale: expected a number in"),
        (("a", "--zero-snr", "--spacing", "trailing"), "expected v_prediction"),
        (("a <lora:x:1>",), "error: PROMPT: expected none .*load it with --lora FILE=SCALE"),
        (("a \udce4",), "error: PROMPT: expected text that UTF-8 can hold"),
        (("a", "--lora", "nowhere=0.5"), "error: --lora: expected a file, got nowhere: No such"),
        (("a", "--embedding", "nowhere"), "error: --embedding: expected a file, got nowhere: No"),
        (("a", "--image", "nowhere.png"), "--image: expected an image, got nowhere.png"),
        (("a", "--strength", "0.5"), "error: --strength: expected None without --image"),
        (("a", "--classes", "3"), "--classes: expected nothing for prompts"),
        (("a", "--dtype", "int8"), "--dtype: expected one of float32"),
        (("a", "--prompts", "nowhere.txt"), "--prompts: expected a text file, got nowhere.txt"),
        (("a", "--device", "cuda:9"), "--device: expected one that works"),
    ],
)
def test_bad_options(tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = sample(tiny, tmp_path / "x.png", *arguments)
    assert done.returncode == 1
    assert message in done.stderr or re.search(message, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "-o", "x.gif"), "--out: expected a name of PNG, JPEG or WebP"),
        (("a",), "--out: expected a file to write"),
        (("a", "-o", "x.png", "--out-dir", "y"), "--out: expected a file to write"),
        (("-o", "x.png"), "PROMPT: expected what to draw"),
        (("-o", "x.png", "--classes", "3"), "--model: expected a folder that `train` wrote"),
        (("a", "-o", "x.png", "--model", "nowhere"), "nowhere: no such file or folder"),
        (("-o", "x.png", "--again", "nowhere.png"), "nowhere.png: expected a picture that carries"),
        (("a", "-o", "x.png", "--again", "y.png"), "--again: expected no other option but --out"),
    ],
)
def test_nothing_to_draw_or_to_draw_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("sample", *arguments)
    assert done.returncode == 1
    assert f"error: {message}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
