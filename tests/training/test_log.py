"""What a run leaves to look at: a log that survives a restart, pictures that change nothing."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import SCHEDULE, STEPS, Points, full_trainer

import diffusion_fast as df
from diffusion_fast.training import CsvLog, SampleGrids, TensorBoardLog, Trainer


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_step(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.csv"
    losses = full_trainer(tmp_path / "run").fit(STEPS, CsvLog(log))
    found = rows(log)
    assert [int(row["step"]) for row in found] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in found] == losses
    validated = [int(row["step"]) for row in found if row["validation_loss"]]
    assert validated == [5, 10, 15, 20]
    assert [p.name for p in log.parent.iterdir()] == ["log.csv"]


def test_a_resumed_run_goes_on_in_its_log(tmp_path: Path) -> None:
    whole, log = tmp_path / "whole.csv", tmp_path / "log.csv"
    full_trainer(tmp_path / "whole").fit(STEPS, CsvLog(whole))

    def stop(progress: df.training.Progress) -> None:
        if progress.step == 12:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        full_trainer(tmp_path / "run").fit(STEPS, [CsvLog(log), stop])
    assert len(rows(log)) == 12  # two more than the checkpoint knows
    again = full_trainer(tmp_path / "run")
    assert again.resume() == 10
    again.fit(STEPS, CsvLog(log))
    assert log.read_text() == whole.read_text()


def test_pictures_of_the_same_noise_leave_training_alone(tmp_path: Path) -> None:
    def run(pictures: bool) -> list[float]:
        torch.manual_seed(0)
        model = df.UNet2DCondition(df.UNetConfig.preset("digits"))
        batch = torch.randn(4, 1, 8, 8), torch.arange(4)
        trainer = Trainer(model, [batch], SCHEDULE, ema_decay=0.5, learning_rate=0.01, read_every=2)
        draw = SampleGrids(
            *(trainer, tmp_path, [4, 1, 8, 8]),
            **{"every": 3, "context": torch.arange(4), "columns": 2, "steps": 2},
            on_drawn=lambda step, picture: drawn.append((step, picture.size)),
        )
        return trainer.fit(6, draw if pictures else ())

    drawn: list[tuple[int, tuple[int, int]]] = []
    assert run(True) == run(False)
    assert drawn == [(4, (22, 22)), (6, (22, 22))]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000004.png", "step_00000006.png"]
    first, second = (Image.open(tmp_path / name) for name in names)
    assert first.size == (2 * 10 + 2, 2 * 10 + 2)
    assert first.tobytes() != second.tobytes()


def events(folder: Path) -> Any:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return found.Reload()


def test_tensorboard(tmp_path: Path) -> None:
    """Scalars of every step, once each, though the run was stopped and steps were lost."""
    pytest.importorskip("tensorboard")

    def stop(progress: df.training.Progress) -> None:
        if progress.step == 12:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        full_trainer(tmp_path / "run").fit(STEPS, [TensorBoardLog(tmp_path / "log"), stop])
    again = full_trainer(tmp_path / "run")
    log = TensorBoardLog(tmp_path / "log", after=again.resume())
    losses = again.fit(STEPS, log)
    log.picture(7, Image.new("RGB", (5, 4)))
    log.picture(8, Image.new("L", (5, 4)))
    found = events(tmp_path / "log")
    scalars = {step.step: step.value for step in found.Scalars("loss")}
    assert scalars == pytest.approx(dict(enumerate(losses, 1)))
    assert len(found.Scalars("loss")) == STEPS
    assert [step.step for step in found.Scalars("validation loss")] == [5, 10, 15, 20]
    shares = [step.value for step in found.Scalars("share of time waiting for data")]
    assert all(0 < share < 1 for share in shares)
    pictures = found.Images("samples")
    assert [(p.step, p.width, p.height) for p in pictures] == [(7, 5, 4), (8, 5, 4)]


def test_tensorboard_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoardLog("log")


def test_the_wait_for_data_is_measured() -> None:
    def slow() -> Iterator[torch.Tensor]:
        while True:
            time.sleep(0.02)
            yield torch.randn(4, 2)

    class Slow:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return slow()

    shares: list[float] = []
    trainer = Trainer(Points(), Slow(), SCHEDULE, read_every=5)
    trainer.fit(10, lambda progress: shares.append(progress.waiting))
    assert len(shares) == 2
    assert all(0.5 < share < 1 for share in shares[1:])
    trainer = Trainer(Points(), [torch.randn(4, 2)], SCHEDULE, read_every=5)
    trainer.fit(10, lambda progress: shares.append(progress.waiting))
    assert shares[3] < 0.5
