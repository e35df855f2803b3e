"""The loss on data that is not trained on, with noise that never changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..conditioning import Context
from ..schedule import DiffusionSchedule
from .batches import Batches, unpacked
from .distributed import Processes
from .loss import predict
from .options import autocast


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Iterable[Any],
    schedule: DiffusionSchedule,
    *,
    prediction_type: str = "epsilon",
    seed: int = 0,
    processes: Processes | None = None,
    precision: str = "float32",
) -> float:
    """The mean squared error over all images, each at a timestep and with a noise of its own.

    They depend on the seed and the image's place only, so two losses differ by the weights alone.
    Timesteps are spread evenly over the schedule; no loss weighting is applied, so runs with
    different ones can be compared.

    Args:
        model: put into eval mode meanwhile.
        batches: data as for a trainer, but finite.
        schedule: the noise schedule.
        prediction_type: what the model predicts.
        seed: random seed of timesteps and noise.
        processes: shares the batches out; the result is the same in each of them.
        precision: ``"float32"`` or ``"bfloat16"``, as for a Trainer.

    Raises:
        ValueError: no batches.
    """
    processes = processes or Processes()
    device = next(model.parameters()).device
    if isinstance(batches, Batches):  # the same pass every time
        batches = itertools.islice(batches.starting_at(0), len(batches))
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, images
    was_training = model.training
    model.eval()
    try:
        for first, turn in _turns(batches, processes.count):
            # In the last turn some have nothing left. They go along, because processes that share
            # a model compute together, and count nothing.
            own = min(processes.rank, len(turn) - 1)
            x_0, context, _ = unpacked(turn[own], device)
            images = len(x_0) if own == processes.rank else 0
            with autocast(device, precision):
                loss = _loss(model, schedule, x_0, context, prediction_type, (seed, first + own))
            total += torch.stack((loss.double() * images, torch.ones_like(loss) * images))
    finally:
        model.train(was_training)
    total = processes.mean(total)
    if not total[1]:
        ops.checks.fail("validation", "at least one batch", "none")
    return (total[0] / total[1]).item()


def _turns(batches: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """``size`` batches at a time, with the number of the first; the last turn may be shorter."""
    rest, first = iter(batches), 0
    while turn := list(itertools.islice(rest, size)):
        yield first, turn
        first += size


def _loss(
    model: nn.Module,
    schedule: DiffusionSchedule,
    x_0: Tensor,
    context: Context,
    prediction_type: str,
    key: tuple[int, int],
) -> Tensor:
    # On the CPU: the same numbers whatever the device.
    mixed = int(np.random.SeedSequence(key).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    batch = len(x_0)
    places = torch.randperm(batch, generator=generator) + torch.rand(
        (), generator=generator, dtype=torch.float32
    )
    t = (places / batch * schedule.timesteps).long().clamp_(max=schedule.timesteps - 1)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
    prediction, target = predict(
        model, schedule, x_0, context, t.to(x_0.device), noise, prediction_type
    )
    return ops.weighted_mse(prediction, target)
