from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import run
from PIL import Image

from diffusion_fast.images import read_settings


def test_train_then_sample(model: Path, tmp_path: Path) -> None:
    arguments = ("--classes", "3,0-1", "--per-class", 2, "--steps", 3, "--seed", 5, "--scale", 4)
    for name in ("a.png", "b.png"):
        done = run("sample", "--model", model, "-o", tmp_path / name, *arguments)
        assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (3 * 34 + 2, 2 * 34 + 2)
    settings = json.loads(picture.text["diffusion_fast"])
    assert settings["classes"] == "3,0-1"
    assert settings["seed"] == 5
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_guidance_of_at_most_1_is_the_conditional_model(model: Path, tmp_path: Path) -> None:
    pixels = []
    for guidance in ("0", "1"):
        drawing = ("--classes", "3", "--per-class", 1, "--steps", 2, "--guidance", guidance)
        done = run("sample", "--model", model, "-o", tmp_path / "x.png", *drawing)
        assert done.returncode == 0, done.stderr
        pixels.append(Image.open(tmp_path / "x.png").tobytes())
    assert pixels[0] == pixels[1]


def test_a_long_list_of_tensors_is_cut(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    config = json.loads((copy / "unet" / "config.json").read_text())
    config["block_out_channels"] = [32, 96]
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    done = run("sample", "--model", copy, "-o", tmp_path / "x.png")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 7
    assert "more, --debug shows them" in done.stderr
    done = run("--debug", "sample", "--model", copy, "-o", tmp_path / "x.png")
    assert len(done.stderr.splitlines()) > 50


def test_a_truncated_model_is_named(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run("sample", "--model", copy, "-o", tmp_path / "x.png")
    assert f"error: {weights}: truncated, or not a safetensors file" in done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--classes", "0-12"), r"--classes: expected classes in \[0, 10\)"),
        (("--classes", "5-3,1"), "--classes: expected ranges that go up"),
        (("--classes", "cat"), r"--classes: expected numbers and ranges such as 0-9"),
        (("--sampler", "fast"), "sampler: expected one of ddpm"),
        (("--steps", "5000"), "steps: expected"),
        (("--guidance", "nan"), "error: --guidance: expected finite numbers"),
    ],
)
def test_bad_options_of_sample(
    model: Path, tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    done = run("sample", "--model", model, "-o", tmp_path / "x.png", *option)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_broken_schedule_is_named(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = copy / "scheduler" / "scheduler_config.json"
    for text, message in (
        ("{", "scheduler_config.json: can't be read"),
        ('{"trained_betas": "abc"}', "scheduler_config.json: betas: expected numbers [T]"),
        ('{"trained_betas": [0.1, 2.0]}', "scheduler_config.json: betas: expected"),
    ):
        config.write_text(text)
        done = run("sample", "--model", copy, "-o", tmp_path / "x.png")
        assert done.returncode == 1
        assert message in done.stderr


def test_again(model: Path, tmp_path: Path) -> None:
    first = run("sample", "--model", model, "-o", tmp_path / "a.png", "--steps", 2, "--seed", 7)
    assert first.returncode == 0, first.stderr
    done = run("sample", "--again", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_many_files(model: Path, tmp_path: Path) -> None:
    arguments = ("--classes", "1,5", "--per-class", 2, "--steps", 2, "--out-dir", tmp_path / "many")
    done = run("sample", "--model", model, *arguments)
    assert done.returncode == 0, done.stderr
    assert "wrote 4 images" in done.stdout
    files = sorted((tmp_path / "many").iterdir())
    assert [file.name for file in files] == [f"0000{i}.png" for i in range(4)]
    assert [read_settings(file)["class"] for file in files] == [1, 5, 1, 5]


@pytest.mark.parametrize("option", ["--negative", "--image", "--size", "--vae"])
def test_options_for_prompts_are_refused(model: Path, tmp_path: Path, option: str) -> None:
    done = run("sample", "--model", model, "-o", tmp_path / "x.png", option, "1")
    assert done.returncode == 1
    assert f"error: {option}: expected nothing for classes" in done.stderr
