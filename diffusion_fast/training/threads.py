"""How many threads to train with, for programs that train; the library itself never changes it.

At every small op the threads of a process wait for the last of them. Beside another program that is
a thread which isn't running, so more threads can be many times slower than one. Sums are rounded
differently by another number of threads, so it is chosen once, before anything that has to be
reproducible, and a checkpoint remembers it.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conditioning import Context
from ..cores import THREADS
from ..files import read_json
from ..ops import checks
from ..schedule import DiffusionSchedule
from .checkpoint import STATE
from .loss import diffusion_loss
from .options import autocast

ROUNDS = 3
GAIN = 1.1  # more threads must be that much faster: others may need the cores later


def rehearsal(
    model: nn.Module,
    schedule: DiffusionSchedule,
    batch: tuple[Any, Context],
    *,
    prediction_type: str = "epsilon",
    precision: str = "float32",
) -> Callable[[], None]:
    """A training step without consequences: on a copy of the model, with generators kept.

    Args:
        model: network to train.
        schedule: the noise schedule.
        batch: x_0 and its context, on the device of the model.
        prediction_type: what the model predicts.
        precision: ``"float32"`` or ``"bfloat16"``, as for a Trainer.
    """
    x_0, context = batch
    twin = copy.deepcopy(model).train()

    def step() -> None:
        with torch.random.fork_rng(devices=[]):
            with autocast(x_0.device, precision):
                loss = diffusion_loss(twin, schedule, x_0, context, prediction_type=prediction_type)
            loss.backward()

    return step


def choose_threads(step: Callable[[], object], checkpoint: Path | None = None) -> str:
    """Set PyTorch's number of threads to the fastest for a step, as far as it is free.

    The variable OMP_NUM_THREADS decides where it is set, and otherwise the checkpoint.

    Args:
        step: a step of training; called a few times by each number of threads.
        checkpoint: folder of the checkpoint to go on from; None for a new run.

    Returns:
        A line that says how many there are, and why.

    Raises:
        CheckpointError: the checkpoint can't be read.
        ValueError: the checkpoint has a number of threads that is none.
    """
    saved = None
    if checkpoint is not None:
        saved = read_json(checkpoint / STATE).get("threads")
        if saved is not None:  # older ones don't have it
            checks.positive_int(f"{checkpoint / STATE}: threads", saved)
    if os.environ.get(THREADS):
        count = torch.get_num_threads()
        other = "" if saved in (None, count) else f" ({saved} in {checkpoint}: rounded differently)"
        return f"threads: {count}, as {THREADS} says{other}"
    if saved is not None:
        torch.set_num_threads(saved)
        return f"threads: {saved}, as in {checkpoint}"
    most = torch.get_num_threads()
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]
    if most > 1:
        torch.set_num_threads(_fastest(step, counts))
    return f"threads: {torch.get_num_threads()} of {most}, the fastest here; {THREADS} sets others"


def _fastest(step: Callable[[], object], counts: list[int]) -> int:
    """The smallest number that is nearly as fast as the fastest, taken in turns."""
    seconds = dict.fromkeys(counts, 0.0)
    step()  # the first one of all is slow
    for _ in range(ROUNDS):
        for count in counts:
            torch.set_num_threads(count)
            start = time.perf_counter()
            step()
            seconds[count] += time.perf_counter() - start
    limit = GAIN * min(seconds.values())
    return next(count for count in counts if seconds[count] <= limit)
