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
from ranks import ALONE, everything, one_step, partly_used, unet_run
from tiny import STEPS, Points, full_trainer
from torch import Tensor

from diffusion_fast.training import Checkpoints, TrainingOptions
from diffusion_fast.training.distributed import Processes, local_device

HERE = Path(__file__).parent


SHARDINGS = ("ddp", "fsdp")
# Twenty steps of Adam, which divides small differences by small numbers.
AFTER_TWENTY_STEPS = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    alone = full_trainer(folder / "one", **ALONE)
    alone.fit(STEPS)
    (folder / "one" / "step_00000015").rename(folder / "alone")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "--max-restarts=2", HERE / "ranks.py", folder]
    path = os.pathsep.join((str(HERE.parents[1]), str(HERE.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # Else restarted workers read the addresses of dead ones from the store they share.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """One process with the joint batch."""
    trainer = full_trainer(tmp_path_factory.mktemp("alone"), **ALONE)
    trainer.fit(STEPS)
    return everything(trainer) | {"validation": torch.tensor(trainer.validation_loss())}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_near(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert error(found[name], value) < limit, name


def joined(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"all": torch.cat([values[name].flatten() for name in sorted(values)])}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_those_of_the_joint_batch(
    ranks: list[dict[str, Any]], accumulate: int, sharding: str
) -> None:
    truth = one_step(1)
    writing = ranks if sharding == "ddp" else ranks[:1]  # the others have no whole tensors
    for rank in writing:
        assert_near(rank[sharding]["gradients"][accumulate], truth, 1e-6)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_parameters_outside_of_the_loss(ranks: list[dict[str, Any]], sharding: str) -> None:
    """Those of no batch, or of some batches alone."""
    assert_near(ranks[0][sharding]["partly"][1], partly_used(1), AFTER_TWENTY_STEPS)


def test_a_parameter_of_the_first_part_of_a_batch_alone(ranks: list[dict[str, Any]]) -> None:
    ddp, fsdp = (ranks[0][sharding]["partly"][3] for sharding in SHARDINGS)
    assert ddp["rare"].abs().min() > 0
    assert_near(ddp, fsdp, AFTER_TWENTY_STEPS)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_unet(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path, sharding: str) -> None:
    """Its blocks are units of a sharded model, called from more than one place. In float64."""
    truth, found = unet_run(tmp_path), ranks[0][sharding]["unet"]
    # As one vector: a bias before a group norm has no gradient but rounding.
    assert_near(joined(found["gradients"]), joined(truth["gradients"]), 1e-12)
    assert_near(joined(found["weights"]), joined(truth["weights"]), 1e-8)
    grids = [path.name for path in sorted((folder / f"grids_{sharding}").iterdir())]
    assert grids == [path.name for path in sorted(tmp_path.iterdir())]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_all_start_with_the_weights_of_the_first(
    ranks: list[dict[str, Any]], sharding: str
) -> None:
    torch.manual_seed(0)
    truth = dict(Points().named_parameters())
    for name, value in truth.items():
        assert torch.equal(ranks[0][sharding]["first_weights"][name], value)


def test_a_sharded_model_is_cut_along_the_first_dimension(ranks: list[dict[str, Any]]) -> None:
    assert set(ranks[0]["sharded"].values()) == {False}
    parts = [rank["fsdp"]["parts"] for rank in ranks]
    for name, parameter in Points().named_parameters():
        rows = sum(part[name][0] for part in parts)
        assert (rows, *parts[0][name][1:]) == tuple(parameter.shape)
        assert parts[0][name][0] == (parameter.shape[0] + 1) // 2


def test_processes_stay_alike(ranks: list[dict[str, Any]]) -> None:
    """Weights, averages, moments, generators and the history of losses, bit for bit."""
    first, second = (rank["run"] for rank in ranks)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for one, other in (ranks, [rank["fsdp"] for rank in ranks]):
        assert one["validation"] == other["validation"]


def assert_same_run(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """But for the order of additions: the history that steers the timesteps stays in step."""
    together = {name: value for name, value in found.items() if name in truth}
    assert found.keys() - truth.keys() <= {"random/global.1"}
    assert set(together) == set(truth) - {"validation"}
    assert torch.equal(together["timesteps/counts"], truth["timesteps/counts"])
    assert torch.equal(together["random/trainer"], truth["random/trainer"])
    floating = [name for name, value in together.items() if value.is_floating_point()]
    assert_near(
        {name: together[name] for name in floating},
        {name: truth[name] for name in floating},
        AFTER_TWENTY_STEPS,
    )


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_does_not_depend_on_the_number_of_processes(
    ranks: list[dict[str, Any]], alone: dict[str, Tensor], sharding: str
) -> None:
    found = ranks[0] if sharding == "ddp" else ranks[0]["fsdp"]
    assert_same_run(found["run"], alone)
    assert found["validation"] == pytest.approx(alone["validation"].item(), rel=1e-4)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_one_process_and_then_two(
    ranks: list[dict[str, Any]], alone: dict[str, Tensor], sharding: str
) -> None:
    assert_same_run(ranks[0][sharding]["from_one"], alone)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_and_then_one(
    folder: Path, alone: dict[str, Tensor], tmp_path: Path, sharding: str
) -> None:
    trainer = full_trainer(tmp_path, **ALONE)
    origin = folder / ("whole" if sharding == "ddp" else "fsdp")
    assert trainer.resume(origin / "step_00000015") == 15
    trainer.fit(STEPS)
    assert_same_run(everything(trainer), alone)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_killed_worker_is_restarted_and_resumes(
    folder: Path, ranks: list[dict[str, Any]], sharding: str
) -> None:
    for number, rank in enumerate(ranks):
        resumed = torch.load(folder / f"resumed_{sharding}{number}.pt")
        assert resumed["resumed"] == 5
        truth = rank["run"] if sharding == "ddp" else rank["fsdp"]["run"]
        assert resumed["run"].keys() == truth.keys()
        for name, value in truth.items():
            assert torch.equal(resumed["run"][name], value), name


def test_broken_weights_of_one_process_stop_all(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert "in all processes" in ranks[0]["not_finite"]
    assert "got others in classes.weight" in ranks[1]["not_finite"]
    assert Checkpoints(folder / "broken").all() == []


def test_the_first_process_alone_writes(folder: Path) -> None:
    saved = Checkpoints(folder / "whole").all()
    assert [path.name for path in saved][-2:] == ["step_00000015", "step_00000020"]


def test_what_does_not_work_with_two(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        errors = rank["errors"]
        assert errors["batch"] == "batch_size: expected a multiple of the 2 processes, got 9"
        assert errors["seed"].startswith("seed: expected a number, because all processes draw")
        assert errors["dataloader"] == (
            "dataloader: expected a training.Batches, for several processes, got list"
        )


def test_a_sharded_model_keeps_its_layout() -> None:
    with pytest.raises(ValueError, match="channels_last: expected False, because of sharding"):
        TrainingOptions(sharding="fsdp", channels_last=True)
    with pytest.raises(ValueError, match="sharding: expected one of ddp, fsdp"):
        TrainingOptions(sharding="both")


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
