"""Nothing is lost: what a resumed run computes is bit for bit what it would have computed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilers import needs_cpu_kernels
from crash import PLACES
from tiny import SCHEDULE, STEPS, Points, batches, full_trainer, points
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.files import CheckpointError
from diffusion_fast.kernels import measurements
from diffusion_fast.ops.cpu import contest
from diffusion_fast.training import P2, Batches, Checkpoints, ImportanceSampler, Trainer

HERE = Path(__file__).parent
VALIDATION = 4  # calls of the model, after every fifth step


def everything(trainer: Trainer) -> dict[str, Tensor]:
    groups, rest = trainer.state()
    tensors = {f"{g}/{n}": v for g, values in groups.items() for n, v in values.items()}
    counts = [rest["step"], rest["batches"], rest["ema_updates"]]
    return {name: v.clone() for name, v in tensors.items()} | {"counts": torch.tensor(counts)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    trainer = full_trainer(tmp_path_factory.mktemp("whole"))
    losses = trainer.fit(STEPS)
    assert len(losses) == STEPS
    # The parts of the state that a test of equality could miss by being empty are not.
    sampler = trainer.objective.timestep_sampler
    assert isinstance(sampler, ImportanceSampler)
    assert sampler.probabilities.unique().numel() > 2
    found = everything(trainer)
    assert {name.split("/")[0] for name in found} >= {"model", "ema", "optimizer", "random"}
    return found


def assert_bit_for_bit(trainer: Trainer, truth: dict[str, Tensor]) -> None:
    found = everything(trainer)
    assert found.keys() == truth.keys()
    assert [name for name, value in truth.items() if not torch.equal(found[name], value)] == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, HERE / "crash.py", folder]
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    ended = dict(line.split() for line in done.stdout.splitlines())
    assert ended == dict.fromkeys(PLACES, str(int(signal.SIGKILL)))
    return folder


RESUMED_AT = {
    "in_forward": 10,
    "between_gradient_and_update": 10,
    "between_update_and_average": 5,
    "in_a_file": 5,
    "before_the_rename": 5,
    "before_the_mark": 5,
    "before_the_mark_has_its_name": 10,
    "while_an_old_one_is_removed": 15,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on(killed: Path, uninterrupted: dict[str, Tensor], place: str) -> None:
    trainer = full_trainer(killed / place)
    with torch.no_grad():  # whatever a new process starts with
        for parameter in trainer.model.parameters():
            parameter.normal_()
    torch.manual_seed(12345)
    assert trainer.resume() == RESUMED_AT[place]
    losses = trainer.fit(STEPS)
    assert len(losses) == STEPS
    assert_bit_for_bit(trainer, uninterrupted)
    assert sorted(p.name for p in (killed / place).iterdir() if "tmp" in p.name) == []


@needs_cpu_kernels
def test_a_resumed_run_takes_the_ways_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on this machine since the checkpoint decides nothing."""
    monkeypatch.setattr(measurements, "known", {})
    file = tmp_path / contest.taken()["machine"]
    monkeypatch.setattr(contest, "_file", lambda: file)
    measurements.remember(file, "attention", "sdpa")
    full_trainer(tmp_path / "run").fit(5)
    measurements.remember(file, "attention", "cpu")
    again = full_trainer(tmp_path / "run")
    assert contest.taken()["ways"] == {"attention": "cpu"}
    assert again.resume() == 5
    assert contest.taken()["ways"] == {"attention": "sdpa"}


def test_ctrl_c_finishes_the_step_and_saves(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    trainer, handler = full_trainer(tmp_path), signal.getsignal(signal.SIGINT)
    hook = trainer.model.register_forward_hook(interrupt_at(7 + VALIDATION))
    with pytest.raises(KeyboardInterrupt, match=r"after step 7 of 20 and saved .*step_00000007"):
        trainer.fit(STEPS)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    again = full_trainer(tmp_path)
    assert again.resume() == 7
    again.fit(STEPS)
    assert_bit_for_bit(again, uninterrupted)


def interrupt_at(*calls: int) -> object:
    seen = 0

    def hook(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen in calls:
            signal.raise_signal(signal.SIGINT)

    return hook


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    trainer = full_trainer(tmp_path, accumulate=3)
    trainer.model.register_forward_hook(interrupt_at(2, 3))  # two parts of the first step
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(STEPS)
    assert list(tmp_path.iterdir()) == []


def test_without_checkpoints_ctrl_c_is_as_ever() -> None:
    trainer = full_trainer(None)
    trainer.model.register_forward_hook(interrupt_at(2))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(STEPS)
    assert trainer.step == 1


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    trainer = full_trainer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: df.training.Progress) -> None:
        if progress.step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        with pytest.raises(OSError, match="step_00000010: can't be written"):
            trainer.fit(STEPS, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    again = full_trainer(tmp_path)
    assert again.resume() == 5
    again.fit(STEPS)
    assert_bit_for_bit(again, uninterrupted)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    full_trainer(tmp_path).fit(STEPS)
    trainer = full_trainer(tmp_path)
    assert trainer.resume() == STEPS
    assert len(trainer.fit(STEPS)) == STEPS
    assert_bit_for_bit(trainer, uninterrupted)


def test_a_constant_rate_can_be_trained_longer(tmp_path: Path) -> None:
    def plain(folder: Path) -> Trainer:
        return full_trainer(folder, decay="constant")

    whole = plain(tmp_path / "whole")
    whole.fit(STEPS)
    truth = everything(whole)
    plain(tmp_path / "parts").fit(10)
    longer = plain(tmp_path / "parts")
    assert longer.resume() == 10
    longer.fit(STEPS)
    assert_bit_for_bit(longer, truth)


def test_channels_last_moments_keep_their_layout(tmp_path: Path) -> None:
    """The fused optimizer walks parameter and moments alike, whatever their strides say."""

    def make() -> Trainer:
        torch.manual_seed(0)
        config = df.UNetConfig.preset("digits")
        images = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
        return Trainer(
            df.UNet2DCondition(config),
            Batches(images, 4),
            SCHEDULE,
            checkpoints=Checkpoints(tmp_path, every=2),
            **{"channels_last": True, "seed": 0, "ema_decay": 0.9},
        )

    whole = make()
    whole.fit(4)
    resumed = make()
    assert resumed.resume(tmp_path / "step_00000002") == 2
    for parameter, moments in resumed.optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
    (tmp_path / "step_00000004").rename(tmp_path / "elsewhere")
    resumed.fit(4)
    assert_bit_for_bit(resumed, everything(whole))


def test_other_settings_are_listed(tmp_path: Path) -> None:
    full_trainer(tmp_path).fit(STEPS)
    before = everything(full_trainer(tmp_path))
    other = full_trainer(
        tmp_path, batch_size=12, learning_rate=0.02, loss_weighting=P2(), gradient_clip=None
    )
    with pytest.raises(ValueError, match="resume: expected the settings of") as error:
        other.resume()
    assert str(error.value).split(", got others: ")[1].split("; ") == [
        "data.batch_size: 24 there, 12 here",
        "gradient_clip: 1.0 there, None here",
        "learning_rate: 0.01 there, 0.02 here",
        "loss_weighting: 'MinSNR(gamma=5.0)' there, 'P2(gamma=1.0, k=1.0)' here",
    ]
    assert_bit_for_bit(other, before)
    faster = full_trainer(tmp_path, learning_rate=0.02)
    assert faster.resume(ignore=["learning_rate"]) == STEPS
    with pytest.raises(ValueError, match=r"ignore: expected one of .*, got 'rate'"):
        full_trainer(tmp_path).resume(ignore=["rate"])


def test_another_length_of_the_cosine_is_refused(tmp_path: Path) -> None:
    full_trainer(tmp_path).fit(STEPS)
    trainer = full_trainer(tmp_path)
    trainer.resume()
    with pytest.raises(ValueError, match=r"steps: expected 20, as for .*step_00000020, got 30"):
        trainer.fit(30)


def test_another_model_is_refused(tmp_path: Path) -> None:
    full_trainer(tmp_path).fit(STEPS)
    trainer = full_trainer(tmp_path)
    trainer.model.net[0] = torch.nn.Linear(5, 17)
    with pytest.raises(CheckpointError, match=r"misshapen: net.0.bias expected \[17\], got \[16\]"):
        trainer.resume(ignore=["model"])
    with pytest.raises(ValueError, match=r"model: 'Points, .* parameters' there"):
        trainer.resume()


class Odd(Points):
    """Tensors that training leaves alone and that a file of tensors can't hold as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(10.0))
        self.register_buffer("low", self.table[:5])
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("same", torch.ones(1).expand(4))
        self.gain = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))
        self.tied = self.net[0]
        self.idle = torch.nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, t, context) * (self.gain * self.gain.conj()).real.to(x.dtype)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_model_of_odd_tensors_is_saved_and_resumed(
    tmp_path: Path, ema_decay: float | None
) -> None:
    def make(folder: Path) -> Trainer:
        torch.manual_seed(0)
        saved = Checkpoints(folder, every=2)
        options = {"ema_decay": ema_decay, "seed": 0, "learning_rate": 0.01}
        return Trainer(Odd(), batches(), SCHEDULE, checkpoints=saved, **options)

    whole = make(tmp_path / "whole")
    whole.fit(4)
    make(tmp_path / "parts").fit(2)
    resumed = make(tmp_path / "parts")
    with torch.no_grad():
        resumed.model.gain.fill_(0)
        resumed.model.table.fill_(0)
    assert resumed.resume() == 2
    resumed.fit(4)
    for name, value in whole.weights().items():
        assert torch.equal(resumed.weights()[name], value), name
    assert (whole.model.gain != 1).all()


def test_a_checkpoint_cut_short_is_named(tmp_path: Path) -> None:
    full_trainer(tmp_path).fit(STEPS)
    trainer = full_trainer(tmp_path)
    file = tmp_path / "step_00000020" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"step_00000020/optimizer.safetensors: expected"):
        trainer.resume()
    assert trainer.resume(tmp_path / "step_00000015") == 15


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    full_trainer(tmp_path).fit(STEPS)
    with pytest.raises(ValueError, match=r"checkpoints: expected none after step 0 .*_00000020"):
        full_trainer(tmp_path).fit(STEPS)
    earlier = full_trainer(tmp_path)
    earlier.resume(tmp_path / "step_00000015")
    with pytest.raises(ValueError, match="checkpoints: expected none after step 15"):
        earlier.fit(STEPS)


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    data = points(24)
    trainer = Trainer(
        *(Points(), Batches(data, 8, seed=1), SCHEDULE),
        **{"checkpoints": Checkpoints(tmp_path, every=2), "read_every": 50},
    )
    bad = trainer.dataloader.items(2)[0]
    data.tensors[0][bad] = float("inf")
    with pytest.raises(FloatingPointError, match=rf"at step 3, on batch 2 \(items {bad}, "):
        trainer.fit(9)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = full_trainer(tmp_path)

    def break_it(progress: df.training.Progress) -> None:
        if progress.step == 10:
            trainer.model.net[0].weight.data[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"model: expected finite .* in net\.0\.weight"):
        trainer.fit(STEPS, break_it)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_the_best_is_that_of_the_validation_loss(tmp_path: Path) -> None:
    measured: dict[int, float] = {}
    trainer = full_trainer(tmp_path)
    trainer.fit(STEPS, lambda p: measured.update({p.step: p.validation_loss}))
    saved = {step: loss for step, loss in measured.items() if loss is not None}
    assert list(saved) == [5, 10, 15, 20]
    assert trainer.checkpoints is not None
    best = trainer.checkpoints.best()
    assert best == trainer.checkpoints.path(min(saved, key=lambda step: saved[step]))


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    assert full_trainer(tmp_path).resume() == 0
    with pytest.raises(ValueError, match="path: expected a checkpoint, because"):
        full_trainer(None).resume()
    full_trainer(tmp_path).fit(STEPS)
    loader = [torch.randn(4, 2)]
    with pytest.raises(ValueError, match=r"dataloader: expected a training.Batches, .* got list"):
        Trainer(Points(), loader, SCHEDULE, checkpoints=Checkpoints(tmp_path)).resume()
    assert batches().settings()["items"] == 24
