"""`diffusion-fast train` with a folder of images, checkpoints and the options of the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from PIL import Image

import diffusion_fast.training
from diffusion_fast import UNet2DCondition
from diffusion_fast.training import Progress, Trainer

SHORT = ("--steps", 6, "--batch-size", 4)


def images(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 12), (60 * i, 0, 0)).save(root / name / f"{i}.png")
    return root


def test_a_folder_with_every_option(tmp_path: Path) -> None:
    data, out = images(tmp_path / "data"), tmp_path / "out"
    options = ("--loss-weighting", "min_snr", "--timestep-sampling", "importance")
    more = ("--precision", "bfloat16", "--accumulate", 2, "--log", tmp_path / "log.csv")
    more += ("--samples-every", 3)
    folder = ("--data", data, "--image-size", 8)
    done = run("train", "--out", out, *folder, *options, *more, *SHORT)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 7
    assert Image.open(out / "samples" / "step_00000006.png").size == (2 * 10 + 2, 4 * 10 + 2)
    picture = tmp_path / "a.png"
    done = run("sample", "--model", out, "-o", picture, "--classes", "0-1", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert Image.open(picture).mode == "RGB"


def test_ctrl_c_then_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    checkpoints = ("--checkpoint-every", 5)
    assert run("train", "--out", whole, *checkpoints, *SHORT).returncode == 0
    step = Trainer._step

    def interrupted(self: Trainer, batch: object) -> torch.Tensor:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        done = run("train", "--out", parts, *checkpoints, *SHORT)
    assert done.returncode == 130
    assert "stopped after step 3 of 6 and saved" in done.stderr
    assert "--resume" in done.stderr
    assert not (parts / "unet").exists()
    again = run("train", "--out", parts, *checkpoints, *SHORT)
    assert again.returncode == 1
    assert "checkpoints: expected none after step 0" in again.stderr
    done = run("train", "--out", parts, *checkpoints, "--resume", *SHORT)
    assert done.returncode == 0, done.stderr
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()
    other = run("train", "--out", parts, *checkpoints, "--resume", *SHORT, "--learning-rate", 0.1)
    assert "learning_rate: 0.002 there, 0.1 here" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss-weighting", "p3"), "--loss-weighting: expected one of none, p2, min_snr"),
        (("--timestep-sampling", "x"), "--timestep-sampling: expected one of uniform, importance"),
        (("--resume",), "--checkpoint-every: expected a number of steps, because of --resume"),
        (("--precision", "float8"), "precision: expected one of float32, bfloat16, float16"),
        (("--sharding", "x"), "sharding: expected one of ddp, fsdp"),
        (("--data", "."), "expected images"),
    ],
)
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("train", "--out", tmp_path / "out", *arguments, *SHORT)
    assert done.returncode == 1
    assert message in done.stderr


def test_images_without_classes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = run("train", "--out", tmp_path / "out", "--data", tmp_path, *SHORT)
    assert "--data: expected a folder with a subfolder for each class" in done.stderr


def test_a_sharded_model_by_two_processes(tmp_path: Path) -> None:
    """Written whole, and the same as by one process but for the order of additions."""
    # Adam takes rounding for a direction where a gradient is about 0: a step's length, then.
    common = ("--checkpoint-every", 5, "--samples-every", 6, "--learning-rate", 5e-4, *SHORT)
    assert run("train", "--out", tmp_path / "one", *common).returncode == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "diffusion_fast", "train", "--sharding", "fsdp"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "two", *map(str, common)],
        **{"capture_output": True, "text": True, "check": False, "timeout": 120},
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("wrote") == 1
    assert (tmp_path / "two" / "samples" / "step_00000006.png").is_file()
    one, two = (UNet2DCondition.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=1e-4, rtol=0)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    class Log:
        def __init__(self, folder: Path, after: int) -> None:
            assert (folder, after) == (tmp_path / "log", 0)

        def __call__(self, progress: Progress) -> None:
            written.append(progress.step)

        def picture(self, step: int, image: Image.Image) -> None:
            written.append(-step)

    monkeypatch.setattr(diffusion_fast.training, "TensorBoardLog", Log)
    log = ("--tensorboard", tmp_path / "log", "--samples-every", 6)
    done = run("train", "--out", tmp_path / "out", *log, *SHORT)
    assert done.returncode == 0, done.stderr
    assert written == [6, -6]
