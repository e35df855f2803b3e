"""The examples run, and so does every Python block of the README, in order."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import diffusion_fast as df
from diffusion_fast.pipelines.card import Defaults

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_and_sample() -> None:
    x = load("train_and_sample").main(epochs=60)
    assert x.shape == (1000, 2)
    assert abs(x.norm(dim=1).mean() - 1) < 0.3


def test_op_in_your_model() -> None:
    assert load("op_in_your_model").main().shape == (2, 64, 16, 16)


def test_in_diffusers() -> None:
    plain, fast = load("in_diffusers").main()
    assert (fast - plain).abs().max() < 1e-5


def test_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    tiny = df.StableDiffusion.from_pretrained("tiny")
    tiny.defaults = Defaults(steps=2)
    files = load("draw").draw(tiny, tmp_path)
    parts = ("", "_guidance", "_denoising", "_inpainting")
    assert [file.name for file in files] == [f"emoji{part}.png" for part in parts]
    for file in files:
        assert min(Image.open(file).size) > 250


def test_digits(tmp_path: Path) -> None:
    """The demo, shorter: every picture is drawn, the table stands at the end.

    So little training does not reach what the demo asks of itself, and it says so.
    """
    command = [sys.executable, ROOT / "examples" / "digits.py", "--out", tmp_path]
    short = ("--train-steps", "6", "--per-class", "2", "--timesteps", "60")
    done = subprocess.run([*command, *short], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "below what is expected" in done.stderr
    assert "Traceback" not in done.stderr
    names = ("noising", "digits", "denoising", "guidance", "loss")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.png" for n in names)
    for path in tmp_path.iterdir():
        assert min(Image.open(path).size) > 100
    assert re.search(r"ddpm\s+│\s+60\s", done.stdout)
    assert "read as asked" in done.stdout
    assert "real, held out" in done.stdout
    assert re.search(r"training 6/6 +loss .* 0:00 left", done.stderr)


@pytest.mark.slow
def test_digits_on_a_slow_machine(tmp_path: Path) -> None:
    """Little time: fewer steps of both, which it says, and all pictures."""
    command = [sys.executable, ROOT / "examples" / "digits.py", "--out", tmp_path]
    short = ("--per-class", "2", "--minutes", "0.05")
    done = subprocess.run([*command, *short], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    steps = re.search(r"on this machine, (\d+) of 1000 steps .* took (\d+) of 1000", said)
    assert steps is not None
    assert all(1 <= int(number) < 1000 for number in steps.groups())
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.slow
def test_the_demo_reaches_what_it_asks_of_itself(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "examples" / "digits.py",
        "--out",
        tmp_path,
        "--minutes",
        "60",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, torch.Tensor] = {}
    shapes = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        shapes.append(names["x"].shape if "x" in names else None)
    assert shapes == [None, (10, 1, 8, 8), (2, 64, 16, 16)]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
