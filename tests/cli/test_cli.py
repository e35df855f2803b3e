"""What all commands share: help, errors in one line, a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run


def test_doctor() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("diffusion_fast", "torch", "gpu", "nvcc", "group_norm_silu", "attention"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "command", ["train", "sample", "serve", "bench", "vae-check", "comfyui", "doctor", ""]
)
def test_help(command: str) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--model", "nowhere", "-o", "x.png"), "error: nowhere: no such file or folder"),
        (("train", "--out", "x", "--data", "cats"), "error: --data: expected digits or a folder"),
        (
            ("train", "--out", "x", "--batch-size", "9999"),
            "--batch-size: expected at most the 1437",
        ),
        (("train", "--out", "x", "--device", "cuda:9"), "--device: expected one that works"),
        (("train", "--out", "/proc/x"), "--out: expected a folder that can be written"),
        (("train", "--out", __file__), "--out: expected a folder that can be written"),
        (("sample", "--model", "nowhere", "-o", "."), "--out: expected a file to write"),
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


@pytest.mark.parametrize(
    "program", [["-m", "diffusion_fast"], ["-c", "import diffusion_fast.cli as c; c.main()"]]
)
def test_in_a_process_of_its_own(program: list[str]) -> None:
    command = [sys.executable, *program, "sample", "--model", "nowhere", "-o", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere: no such file or folder")
