"""What each process does under torchrun in the tests: ranks.py FOLDER.

Writes what it found to FOLDER/rank<n>.pt. After that the second process kills itself in the middle
of a step; torchrun starts both anew, and they resume.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from crash import at_call, nothing
from tiny import SCHEDULE, STEPS, Points, batches, full_trainer
from torch import Tensor, nn

from diffusion_fast.training import Trainer, state

FOLDER = Path(sys.argv[1])
ALONE = {"dropout": 0.0}  # masks of dropout are drawn by each process, not for the joint batch


def one_step(accumulate: int) -> dict[str, Tensor]:
    trainer = full_trainer(None, accumulate=accumulate, gradient_clip=None, **ALONE)
    (loss,) = trainer.fit(1)
    return gradients(trainer.model) | {"loss": torch.tensor(loss)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole_run(folder: Path) -> tuple[Trainer, dict[str, Tensor]]:
    trainer = full_trainer(folder, **ALONE)
    trainer.fit(STEPS)
    return trainer, everything(trainer)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    groups, _ = state.collect(trainer)
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


def main() -> None:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first:
        trainer, whole = whole_run(FOLDER / "whole")
        found = {
            "gradients": {n: one_step(n) for n in (1, 3)},
            "run": whole,
            "errors": errors(),
            "validation": trainer.validation_loss(),
        }
        torch.save(found, FOLDER / f"rank{trainer.processes.rank}.pt")
    trainer = full_trainer(FOLDER / "killed", **ALONE)
    resumed = trainer.resume()
    if first and trainer.processes.rank == 1:
        hook = at_call(9, nothing, nothing)  # after the checkpoint of step 5
        trainer.optimizer.register_step_pre_hook(hook)
    trainer.fit(STEPS)
    found = {"resumed": resumed, "run": everything(trainer)}
    torch.save(found, FOLDER / f"resumed{trainer.processes.rank}.pt")


if __name__ == "__main__":
    assert batches(8).batch_size == 8
    signal.alarm(100)  # a process that waits for one that is gone ends all the same
    main()
