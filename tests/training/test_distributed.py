"""Two processes under torchrun (gloo, CPU) beside one with the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import error
from ranks import ALONE, everything, one_step
from tiny import STEPS, full_trainer
from torch import Tensor

from diffusion_fast.training import Checkpoints
from diffusion_fast.training.distributed import Processes, local_device

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "--max-restarts=1", HERE / "ranks.py", folder]
    path = os.pathsep.join((str(HERE.parents[1]), str(HERE.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # Else restarted workers read the addresses of dead ones from the store they share.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_near(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert error(found[name], value) < limit, name


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_those_of_the_joint_batch(
    ranks: list[dict[str, Any]], accumulate: int
) -> None:
    truth = one_step(1)
    for rank in ranks:
        assert_near(rank["gradients"][accumulate], truth, 1e-6)


def test_processes_stay_alike(ranks: list[dict[str, Any]]) -> None:
    """Weights, averages, moments, generators and the history of losses, bit for bit."""
    first, second = (rank["run"] for rank in ranks)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert ranks[0]["validation"] == ranks[1]["validation"]


def test_a_run_does_not_depend_on_the_number_of_processes(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Only on the order of additions: the history that steers the timesteps stays in step."""
    trainer = full_trainer(tmp_path, **ALONE)
    trainer.fit(STEPS)
    truth = everything(trainer)
    together = {name: value for name, value in ranks[0]["run"].items() if name in truth}
    assert set(truth) == set(together)
    assert ranks[0]["run"].keys() - truth.keys() == {"random/global.1"}
    assert torch.equal(together["timesteps/counts"], truth["timesteps/counts"])
    assert torch.equal(together["random/trainer"], truth["random/trainer"])
    floating = [name for name, value in truth.items() if value.is_floating_point()]
    assert_near(
        {name: together[name] for name in floating},
        {name: truth[name] for name in floating},
        1e-4,  # twenty steps of Adam, which divides small differences by small numbers
    )
    assert ranks[0]["validation"] == pytest.approx(trainer.validation_loss(), rel=1e-4)


def test_a_killed_worker_is_restarted_and_resumes(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    for number, rank in enumerate(ranks):
        resumed = torch.load(folder / f"resumed{number}.pt")
        assert resumed["resumed"] == 5
        for name, value in rank["run"].items():
            assert torch.equal(resumed["run"][name], value), name


def test_the_first_process_alone_writes(folder: Path) -> None:
    saved = Checkpoints(folder / "whole").all()
    assert [path.name for path in saved][-2:] == ["step_00000015", "step_00000020"]


def test_another_number_of_processes_is_listed(folder: Path) -> None:
    trainer = full_trainer(folder / "whole", **ALONE)
    with pytest.raises(ValueError, match="processes: 2 there, 1 here"):
        trainer.resume()
    assert trainer.resume(ignore=["processes"]) == STEPS


def test_what_does_not_work_with_two(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        errors = rank["errors"]
        assert errors["batch"] == "batch_size: expected a multiple of the 2 processes, got 9"
        assert errors["seed"].startswith("seed: expected a number, because all processes draw")
        assert errors["dataloader"] == (
            "dataloader: expected a training.Batches, for several processes, got list"
        )


def test_parts_of_a_batch() -> None:
    joint = torch.arange(6)
    assert [Processes(rank, 3).part(joint).tolist() for rank in range(3)] == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    assert Processes().part(joint) is joint


def test_the_device_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda:3")
    assert local_device("cpu") == torch.device("cpu")
