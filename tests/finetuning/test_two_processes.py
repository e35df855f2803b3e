"""Twenty steps on two processes under torchrun (gloo, CPU) beside the same on one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from numerics import error
from rank_runs import CASES, STEPS, case
from small_runs import write_images
from torch import Tensor

from diffusion_fast.training.checkpoint import read_checkpoint

HERE = Path(__file__).parent
# Adam divides small differences by small numbers.
AFTER_TWENTY_STEPS = 1e-3


def on_two(model: Path, images: Path, out: Path, cases: Sequence[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, HERE / "rank_runs.py", model, images, out, *cases]
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


def trained(folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and averages of the last checkpoint, and the loss of every step."""
    groups, _ = read_checkpoint(folder / "checkpoints" / f"step_{STEPS:08d}")
    found = {f"{g}/{n}": v for g in ("model", "ema") for n, v in groups.get(g, {}).items()}
    return found, groups["run"]["losses"].tolist()


@pytest.mark.parametrize(
    "cases",
    [["lora"], pytest.param([name for name in CASES if name != "lora"], marks=pytest.mark.slow)],
    ids=["lora", "others"],
)
def test_two_processes_are_as_one(
    cases: list[str], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model, images = tiny_folder("sd15"), write_images(tmp_path / "images")
    shutil.copytree(images, tmp_path / "hints")
    on_two(model, images, tmp_path / "two", cases)
    for name in cases:
        alone = case(model, images, tmp_path / "one", name)
        start = {n: p.detach().clone() for n, p in alone.network.named_parameters()}
        alone.train()
        (truth, losses) = trained(tmp_path / "one" / name)
        (found, own_losses) = trained(tmp_path / "two" / name)
        assert len(losses) == STEPS
        assert error(torch.tensor(own_losses), torch.tensor(losses)) < AFTER_TWENTY_STEPS
        assert found.keys() == truth.keys()

        def change(values: dict[str, Tensor], start: dict[str, Tensor] = start) -> Tensor:
            moved = [v - start[n.partition("/")[2]] for n, v in sorted(values.items())]
            return torch.cat([one.flatten() for one in moved])

        assert change(truth).abs().max() > 1e-3
        away = (change(found) - change(truth)).norm() / change(truth).norm()
        assert away < 10 * AFTER_TWENTY_STEPS, (name, away)
        for file in alone.files():
            two = tmp_path / "two" / name / file.name
            assert two.stat().st_size == file.stat().st_size
        samples = (tmp_path / "two" / name / "samples").glob("*.png")
        assert len(list(samples)) == (2 if "validation_prompts" in CASES[name] else 0)
