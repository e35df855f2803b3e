"""What a run leaves to look at: a log that survives a restart, pictures that change nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import SCHEDULE, STEPS, full_trainer

import diffusion_fast as df
from diffusion_fast.training import CsvLog, SampleGrids, Trainer


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
        )
        return trainer.fit(6, draw if pictures else ())

    assert run(True) == run(False)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000004.png", "step_00000006.png"]
    first, second = (Image.open(tmp_path / name) for name in names)
    assert first.size == (2 * 10 + 2, 2 * 10 + 2)
    assert first.tobytes() != second.tobytes()
