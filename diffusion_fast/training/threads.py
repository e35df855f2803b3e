"""How many threads share a training step, and PyTorch's number where a run goes on.

At every small op the threads of a process wait for the last of them. Beside another program that is
a thread which isn't running, so more threads can be many times slower than one. Sums are rounded
differently by another number of threads, so a checkpoint remembers both. The library never changes
PyTorch's number; its steps use fewer where that is faster.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..conditioning import Context, bind, form
from ..cores import THREADS
from ..engine.rewrites.cost import Calls
from ..engine.rewrites.plan import OpCall
from ..files import read_json
from ..ops import checks
from ..ops.cpu import contest, threads
from ..schedule import DiffusionSchedule
from .batches import moved, split, unpacked
from .checkpoint import STATE
from .gradient import Gradient, only_computes
from .loss import predict
from .objective import Objective
from .options import autocast

PASSES = 3  # forward, and in the backward pass two products for each one


def for_step(model: nn.Module, objective: Objective, batch: Any) -> int:
    """How many threads share a training step on a CPU: as many as it is the fastest with.

    Measured once for each network, batch and machine, as an engine measures, by
    :func:`rehearsal`. Where a call may do more than to compute, in a network with hooks or with
    modules of other packages, and in several processes, nothing is measured: all threads share it.

    Args:
        model: the network.
        objective: what trains it.
        batch: as the objective takes it.
    """
    options = objective.options
    if objective.processes.count > 1 or options.compile or not only_computes(model):
        return threads.most()
    x_0, context, _ = unpacked(batch, objective.device)
    if options.channels_last and x_0.dim() == 4:
        x_0 = x_0.contiguous(memory_format=torch.channels_last)
    _, x_0, context = split(x_0, context, options.accumulate)[0]
    weights = [(p.shape, p.stride(), p.dtype, p.requires_grad) for p in model.parameters()]
    about = (str(model), weights, x_0.shape, x_0.stride(), x_0.dtype, form(context))
    kind = {"prediction_type": options.prediction_type, "precision": options.precision}
    name = f"training {about} {sorted(kind.items())}"
    work = contest.Work(name, lambda: _calls(model, x_0, context) * PASSES)
    return contest.threads_for(work, rehearsal(model, objective.schedule, (x_0, context), **kind))


@torch.no_grad()
def _calls(model: nn.Module, x_0: Tensor, context: Context) -> list[OpCall]:
    """The op calls of the forward pass, found on the meta device."""
    place = torch.device("meta")
    twin, watch = _twin(model, lambda value: value.to(place)), Calls()
    t = torch.empty(len(x_0), dtype=torch.int64, device=place)
    with watch:
        bind(twin, moved(context, place))(x_0.to(place), t)
    return watch.found


def _twin(model: nn.Module, as_its: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model, in training, with other tensors in the place of its weights."""
    memory: dict[int, Any] = {}
    for parameter in model.parameters():
        own = nn.Parameter(as_its(parameter.detach()), parameter.requires_grad)
        memory[id(parameter)] = own
    for buffer in model.buffers():
        memory[id(buffer)] = as_its(buffer.detach()).clone()
    return copy.deepcopy(model, memory).train()


def rehearsal(
    model: nn.Module,
    schedule: DiffusionSchedule,
    batch: tuple[Any, Context],
    *,
    prediction_type: str = "epsilon",
    precision: str = "float32",
) -> Callable[[], None]:
    """A training step without consequences: on a copy of the model, with generators kept.

    The copy shares the memory of the weights, which no step without an optimizer writes to.

    Args:
        model: network to train.
        schedule: the noise schedule.
        batch: x_0 and its context, on the device of the model.
        prediction_type: what the model predicts.
        precision: as for a Trainer.
    """
    x_0, context = batch
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(schedule.timesteps, (len(x_0),), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)

    @functools.cache
    def made() -> tuple[nn.Module, Gradient]:  # unless nothing is measured
        twin = _twin(model, lambda value: value)

        def loss(x: Tensor, c: Context, t: Tensor, noise: Tensor) -> tuple[Tensor, None]:
            with autocast(x.device, precision):
                prediction, target = predict(twin, schedule, x, c, t, noise, prediction_type)
            return ops.weighted_mse(prediction, target), None

        return twin, Gradient(twin, loss)

    def step() -> None:
        twin, gradient = made()
        with torch.random.fork_rng(devices=[]):  # for dropout
            gradient(x_0, context, t, noise)
        twin.zero_grad()

    return step


def take_threads(checkpoint: Path) -> str:
    """Set PyTorch's number of threads to that with which a checkpoint was made.

    The variable OMP_NUM_THREADS decides where it is set.

    Args:
        checkpoint: folder of the checkpoint to go on from.

    Returns:
        A line that says how many there are, and why.

    Raises:
        CheckpointError: the checkpoint can't be read.
        ValueError: the checkpoint has a number of threads that is none.
    """
    count = torch.get_num_threads()
    saved = read_json(checkpoint / STATE).get("threads", count)  # older ones don't have it
    checks.positive_int(f"{checkpoint / STATE}: threads", saved)
    if os.environ.get(THREADS):
        other = "" if saved == count else f" ({saved} in {checkpoint}: rounded differently)"
        return f"threads: {count}, as {THREADS} says{other}"
    torch.set_num_threads(saved)
    return f"threads: {saved}, as in {checkpoint}"
