from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import run


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


def test_a_full_disk_leaves_the_model_that_was_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_fast.files.write_json", full)
    done = run("train", "--out", model, "--steps", 2, "--batch-size", 8)
    assert done.returncode == 1
    assert f"error: {model}: can't be written" in done.stderr
    assert {p: p.read_bytes() for p in model.rglob("*") if p.is_file()} == before
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_missing_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    done = run("train", "--out", tmp_path / "m")
    assert "pip install scikit-learn" in done.stderr
    assert not (tmp_path / "m").exists()
