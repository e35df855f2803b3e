"""What each process does under torchrun in the tests: ranks.py FOLDER.

Writes what it found to FOLDER/rank<n>.pt. After that the second process kills itself in the middle
of a step; torchrun starts both anew, and they resume. Then the same with a sharded model.
FOLDER/alone holds a checkpoint of one process.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from crash import at_call, nothing
from tiny import SCHEDULE, STEPS, Points, batches, full_trainer
from torch import Tensor
from torch.utils.data import TensorDataset
from unmeasured import unmeasured

import diffusion_fast as df
from diffusion_fast.training import Batches, SampleGrids, Trainer
from diffusion_fast.training.distributed import is_sharded, local, whole

FOLDER = Path(sys.argv[-1])  # the tests import this file as well, and don't use it
ALONE = {"dropout": 0.0}  # masks of dropout are drawn by each process, not for the joint batch


def one_step(accumulate: int, sharding: str = "ddp") -> dict[str, Tensor]:
    options = {"accumulate": accumulate, "sharding": sharding}
    trainer = full_trainer(None, gradient_clip=None, **options, **ALONE)
    (loss,) = trainer.fit(1)
    return gradients(trainer) | {"loss": torch.tensor(loss)}


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in whole(found, trainer.processes).items()}


def unet_run(folder: Path, sharding: str = "ddp") -> dict[str, dict[str, Tensor]]:
    """Gradients of the first step, weights after three, with pictures in between."""
    torch.manual_seed(4)
    config = df.UNetConfig.preset("digits", block_out_channels=(8, 16), cross_attention_dim=8)
    images = TensorDataset(torch.randn(24, 1, 8, 8).double(), torch.arange(24) % 10)
    trainer = Trainer(
        df.UNet2DCondition(config).double(),
        Batches(images, 8, seed=3),
        *(SCHEDULE,),
        **{"null_context": torch.tensor([10]), "condition_dropout": 0.2, "ema_decay": 0.9},
        **{"sharding": sharding, "read_every": 1, "seed": 2},
    )
    grids = SampleGrids(trainer, folder, (2, 1, 8, 8), every=1, context=torch.arange(2), steps=2)
    trainer.fit(1, grids)
    found = {"gradients": gradients(trainer)}
    trainer.fit(3, grids)
    return found | {"weights": {name: v.clone() for name, v in trainer.weights().items()}}


class Partly(Points):
    """A parameter that has no part in the loss, and one that is used in every third call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = torch.nn.Linear(2, 2)
        self.rare = torch.nn.Parameter(torch.zeros(2))
        self.number = 0

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.number += 1
        out = super().forward(x, t, context)
        return out + self.rare if self.number % 3 == 1 else out


def partly_used(accumulate: int, sharding: str = "ddp") -> dict[str, Tensor]:
    """Weights after six steps of a model with parameters outside of the loss."""
    torch.manual_seed(6)
    options = {"accumulate": accumulate, "sharding": sharding, "weight_decay": 0.1, "seed": 0}
    trainer = Trainer(Partly(), batches(12), SCHEDULE, learning_rate=0.01, **options)
    trainer.fit(6)
    return {name: value.clone() for name, value in trainer.weights().items()}


def whole_run(
    folder: Path, sharding: str = "ddp", origin: Path | None = None
) -> tuple[Trainer, dict[str, Tensor]]:
    trainer = full_trainer(folder, sharding=sharding, **ALONE)
    if origin is not None:
        trainer.resume(origin)
    trainer.fit(STEPS)
    return trainer, everything(trainer)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    groups, _ = trainer.state()
    return {
        f"{g}/{n}": v.detach().clone() for g, tensors in groups.items() for n, v in tensors.items()
    }


def errors() -> dict[str, str]:
    found = {}
    for name, options in (("seed", {"seed": None}), ("batch", {"batch_size": 9})):
        try:
            full_trainer(None, **options)
        except ValueError as error:
            found[name] = str(error)
    try:
        Trainer(Points(), [torch.randn(4, 2)], SCHEDULE, seed=0)
    except ValueError as error:
        found["dataloader"] = str(error)
    return found


def not_finite() -> str:
    """The parts of one process alone are broken."""
    trainer = full_trainer(FOLDER / "broken", sharding="fsdp", **ALONE)
    if trainer.processes.rank == 1:
        with torch.no_grad():
            local(next(trainer.model.parameters()))[-1] = float("nan")
    try:
        trainer._save(None)
    except FloatingPointError as error:
        return str(error)
    return ""


def first_weights(sharding: str) -> dict[str, Tensor]:
    """Of processes that each start with a model of their own."""
    torch.manual_seed(int(os.environ["RANK"]))
    trainer = Trainer(Points(), batches(8), SCHEDULE, sharding=sharding, seed=0)
    return {name: value.clone() for name, value in trainer.weights().items()}


def before_the_kill() -> None:
    trainer, run = whole_run(FOLDER / "whole")
    found: dict[str, Any] = {
        "run": run,
        "errors": errors(),
        "validation": trainer.validation_loss(),
        "not_finite": not_finite(),
        "sharded": {n: is_sharded(p) for n, p in trainer.model.named_parameters()},
    }
    for sharding in ("ddp", "fsdp"):
        found[sharding] = {
            "gradients": {n: one_step(n, sharding) for n in (1, 3)},
            "unet": unet_run(FOLDER / f"grids_{sharding}", sharding),
            "first_weights": first_weights(sharding),
            "partly": {n: partly_used(n, sharding) for n in (1, 3)},
            "from_one": whole_run(FOLDER / f"one_{sharding}", sharding, FOLDER / "alone")[1],
        }
    trainer, found["fsdp"]["run"] = whole_run(FOLDER / "fsdp", "fsdp")
    found["fsdp"]["validation"] = trainer.validation_loss()
    found["fsdp"]["parts"] = {n: local(p).shape for n, p in trainer.model.named_parameters()}
    torch.save(found, FOLDER / f"rank{trainer.processes.rank}.pt")


def killed(sharding: str, dies: bool) -> None:
    trainer = full_trainer(FOLDER / f"killed_{sharding}", sharding=sharding, **ALONE)
    resumed = trainer.resume()
    if dies and trainer.processes.rank == 1:
        hook = at_call(9, nothing, nothing)  # after the checkpoint of step 5
        trainer.optimizer.register_step_pre_hook(hook)
    trainer.fit(STEPS)
    found = {"resumed": resumed, "run": everything(trainer)}
    torch.save(found, FOLDER / f"resumed_{sharding}{trainer.processes.rank}.pt")


def main() -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0:
        before_the_kill()
    if attempt <= 1:
        killed("ddp", attempt == 0)
    killed("fsdp", attempt == 1)


if __name__ == "__main__":
    assert batches(8).batch_size == 8
    unmeasured()
    signal.alarm(250)  # a process that waits for one that is gone ends all the same
    main()
