"""The command line as its users meet it: in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from diffusion_fast.cli import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """The command line in this process, with its own arguments and streams."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["diffusion-fast", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    done = run("train", "--out", folder, "--steps", 12, "--batch-size", 16)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder}" in done.stdout
    assert "12/12" in done.stderr
    return folder


def test_train_then_sample(model: Path, tmp_path: Path) -> None:
    arguments = ("--classes", "3,0-1", "--per-class", 2, "--steps", 3, "--seed", 5, "--scale", 4)
    for name in ("a.png", "b.png"):
        done = run("sample", model, "-o", tmp_path / name, *arguments)
        assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (3 * 34 + 2, 2 * 34 + 2)
    settings = json.loads(picture.text["diffusion_fast"])
    assert settings["classes"] == [3, 0, 1]
    assert settings["seed"] == 5
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_training_again_gives_the_same_files(model: Path, tmp_path: Path) -> None:
    run("train", "--out", tmp_path, "--steps", 12, "--batch-size", 16)
    names = sorted(p.relative_to(model) for p in model.rglob("*") if p.is_file())
    assert [str(name) for name in names] == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for name in names:
        assert (model / name).read_bytes() == (tmp_path / name).read_bytes()


def test_doctor() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("diffusion_fast", "torch", "gpu", "nvcc", "group_norm_silu", "attention"):
        assert word in done.stdout


@pytest.mark.parametrize("command", ["train", "sample", "doctor", ""])
def test_help(command: str) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "nowhere", "-o", "x.png"), "error: nowhere: no such file or folder"),
        (("train", "--out", "x", "--data", "cats"), "error: --data: expected digits or a folder"),
        (
            ("train", "--out", "x", "--batch-size", "9999"),
            "--batch-size: expected at most the 1437",
        ),
        (("train", "--out", "x", "--device", "cuda:9"), "--device: expected one that works"),
        (("train", "--out", "/proc/x"), "--out: expected a folder that can be written"),
        (("train", "--out", __file__), "--out: expected a folder that can be written"),
        (("sample", "nowhere", "-o", "."), "--out: expected a file to write"),
    ],
)
def test_errors_are_one_line_that_names_the_fix(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert "Traceback" in run("--debug", *arguments).stderr


def test_a_full_disk_leaves_the_model_that_was_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_fast.models.checkpoints.write_json", full)
    done = run("train", "--out", model, "--steps", 2, "--batch-size", 8)
    assert done.returncode == 1
    assert f"error: {model}: can't be written" in done.stderr
    assert {p: p.read_bytes() for p in model.rglob("*") if p.is_file()} == before
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_long_list_of_tensors_is_cut(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    config = json.loads((copy / "unet" / "config.json").read_text())
    config["block_out_channels"] = [32, 96]
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    done = run("sample", copy, "-o", tmp_path / "x.png")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 7
    assert "more, --debug shows them" in done.stderr
    assert len(run("--debug", "sample", copy, "-o", tmp_path / "x.png").stderr.splitlines()) > 50


def test_a_truncated_model_is_named(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run("sample", copy, "-o", tmp_path / "x.png")
    assert f"error: {weights}: truncated, or not a safetensors file" in done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--classes", "0-12"), r"--classes: expected classes in \[0, 10\)"),
        (("--classes", "5-3,1"), "--classes: expected ranges that go up"),
        (("--classes", "cat"), r"--classes: expected numbers and ranges such as 0-9"),
        (("--sampler", "fast"), "sampler: expected one of ddpm"),
        (("--steps", "5000"), "steps: expected"),
        (("--guidance", "nan"), "guidance_scale: expected"),
    ],
)
def test_bad_options_of_sample(
    model: Path, tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    done = run("sample", model, "-o", tmp_path / "x.png", *option)
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
        done = run("sample", copy, "-o", tmp_path / "x.png")
        assert done.returncode == 1
        assert message in done.stderr


def test_a_missing_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    done = run("train", "--out", tmp_path / "m")
    assert "pip install scikit-learn" in done.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "program", [["-m", "diffusion_fast"], ["-c", "import diffusion_fast.cli as c; c.main()"]]
)
def test_in_a_process_of_its_own(program: list[str]) -> None:
    command = [sys.executable, *program, "sample", "nowhere", "-o", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere: no such file or folder")
