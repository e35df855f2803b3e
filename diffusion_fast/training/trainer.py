"""Training: batches in, a model and its averaged weights out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Context
from ..ops import checks
from ..ops.add_noise import TARGETS
from ..schedule import DiffusionSchedule
from .ema import EMA
from .loss import diffusion_loss, drop_condition


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; every value is checked.

    Attributes:
        learning_rate: of AdamW at its peak.
        weight_decay: of AdamW.
        warmup_steps: over which the rate rises from zero.
        decay: ``"constant"``, or ``"cosine"`` down to zero at the last step.
        gradient_clip: largest norm of the gradient; None for no limit.
        ema_decay: of the averaged weights; None to keep none.
        condition_dropout: share of conditions replaced by ``null_context`` (0.1 is usual).
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        read_every: steps between two reads of the loss on the host.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    gradient_clip: float | None = None
    ema_decay: float | None = None
    condition_dropout: float = 0.0
    prediction_type: str = "epsilon"
    read_every: int = 10

    def __post_init__(self) -> None:
        checks.finite("learning_rate", self.learning_rate)
        if self.learning_rate <= 0:
            checks.fail("learning_rate", "a positive number", self.learning_rate)
        if self.weight_decay < 0:
            checks.fail("weight_decay", "a number of at least 0", self.weight_decay)
        if self.warmup_steps < 0:
            checks.fail("warmup_steps", "a number of at least 0", self.warmup_steps)
        checks.one_of("decay", self.decay, ("constant", "cosine"))
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            checks.fail("gradient_clip", "a positive number or None", self.gradient_clip)
        if not 0 <= self.condition_dropout <= 1:
            checks.fail("condition_dropout", "a probability in [0, 1]", self.condition_dropout)
        checks.one_of("prediction_type", self.prediction_type, TARGETS)
        checks.positive_int("read_every", self.read_every)


@dataclass
class Progress:
    """Where a run stands, as handed to ``on_read``."""

    step: int
    steps: int
    loss: float
    losses: list[float] = field(repr=False)


class Trainer:
    """Trains a model on batches of data.

    Args:
        model: an ``nn.Module`` called as ``model(x_t, t)`` or ``model(x_t, t, context)``; batches
            go to the device of its parameters.
        dataloader: anything that can be iterated again and again and yields batches: x_0, (x_0,),
            or (x_0, context) with a tensor or a dict of tensors as context.
        schedule: the noise schedule.
        null_context: what stands for no condition, for ``condition_dropout``.
        seed: of timesteps, noise and dropout; None draws from PyTorch's global generator.
        options: as in :class:`TrainingOptions`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        schedule: DiffusionSchedule,
        *,
        null_context: Context = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.dataloader, self.schedule = model, dataloader, schedule
        self.options = TrainingOptions(**options)
        if self.options.condition_dropout > 0 and null_context is None:
            checks.fail("null_context", "a null condition, because of condition_dropout", None)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            checks.fail("model", "at least one parameter that requires a gradient", "none")
        self.device = parameters[0].device
        self.null_context = _moved(null_context, self.device)
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            fused=True,
        )
        self.ema = (
            EMA(model, self.options.ema_decay) if self.options.ema_decay is not None else None
        )

    def fit(self, steps: int, on_read: Callable[[Progress], None] | None = None) -> list[float]:
        """Train for a number of steps, going round the data as often as that needs.

        Args:
            steps: batches to train on.
            on_read: called every ``read_every`` steps, and after the last, with the progress.

        Returns:
            The loss of every step.

        Raises:
            FloatingPointError: the loss stopped being finite; names the first such step.
            ValueError: an empty dataloader, or a batch that doesn't fit the model.
        """
        checks.positive_int("steps", steps)
        was_training = self.model.training
        self.model.train()
        losses: list[float] = []
        pending: list[Tensor] = []
        try:
            for step, batch in zip(range(1, steps + 1), _forever(self.dataloader), strict=False):
                self._set_rate(step, steps)
                pending.append(self._step(batch))
                if step % self.options.read_every == 0 or step == steps:
                    losses += _read(pending, len(losses))
                    pending.clear()
                    if on_read is not None:
                        on_read(Progress(step, steps, losses[-1], losses))
        finally:
            self.model.train(was_training)
        return losses

    def _step(self, batch: Any) -> Tensor:
        x_0, context = _unpacked(batch, self.device)
        context = drop_condition(
            context, self.null_context, self.options.condition_dropout, self.generator
        )
        loss = diffusion_loss(
            self.model,
            self.schedule,
            x_0,
            context,
            prediction_type=self.options.prediction_type,
            generator=self.generator,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.options.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return loss.detach()

    def _set_rate(self, step: int, steps: int) -> None:
        """Linear warm-up, then constant or a half cosine to zero."""
        warmup, rate = self.options.warmup_steps, self.options.learning_rate
        if step < warmup:
            rate *= step / warmup
        elif self.options.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def train_diffusion(
    model: nn.Module,
    dataloader: Iterable[Any],
    schedule: DiffusionSchedule,
    epochs: int = 10,
    **options: Any,
) -> list[float]:
    """Train a model by the DDPM objective: the short form of :class:`Trainer`.

    Args:
        model: called as ``model(x_t, t)``, or ``model(x_t, t, context)`` where batches have a
            context.
        dataloader: yields x_0, or (x_0, context); needs a length.
        schedule: the noise schedule.
        epochs: times to go through the data.
        options: as for :class:`Trainer` and :class:`TrainingOptions`.

    Returns:
        The loss of every step.
    """
    checks.positive_int("epochs", epochs)
    if not isinstance(dataloader, Sized):
        raise TypeError("dataloader: expected one with a length; Trainer.fit(steps) takes any")
    if not len(dataloader):
        checks.fail("dataloader", "at least one batch", "none")
    return Trainer(model, dataloader, schedule, **options).fit(epochs * len(dataloader))


def _forever(dataloader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            checks.fail("dataloader", "at least one batch in every pass", "none")


def _unpacked(batch: Any, device: torch.device) -> tuple[Tensor, Context]:
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        x_0, context = batch[0], batch[1] if len(batch) == 2 else None
    else:
        x_0, context = batch, None
    if not isinstance(x_0, Tensor):
        got = type(batch).__name__
        raise TypeError(f"dataloader: expected batches x_0 or (x_0, context), got a {got}")
    return x_0.to(device, non_blocking=True), _moved(context, device)


def _moved(context: Context, device: torch.device) -> Context:
    if isinstance(context, Mapping):
        return {key: value.to(device, non_blocking=True) for key, value in context.items()}
    return context.to(device, non_blocking=True) if context is not None else None


def _read(pending: list[Tensor], before: int) -> list[float]:
    losses: list[float] = torch.stack(pending).tolist()
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            step = before + index + 1
            raise FloatingPointError(f"loss: expected a finite number, got {loss} at step {step}")
    return losses
