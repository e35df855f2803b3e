"""Training: batches in, a model and its averaged weights out."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..conditioning import Context
from ..cores import warn_of_threads
from ..files import AnyPath, CheckpointError
from ..ops import checks
from ..ops.cpu import library as cpu_kernels
from ..schedule import DiffusionSchedule
from ..turns import Turns
from .batches import Batches, forever
from .checkpoint import (
    Checkpoints,
    Groups,
    check_finite,
    compare_settings,
    compare_tensors,
    read_checkpoint,
)
from .distributed import Processes, fill, local, whole
from .ema import EMA, is_finite, named_tensors
from .objective import Objective
from .optimizers import make_optimizer
from .options import TrainingOptions
from .rehearsal import Rehearsals
from .state import load_optimizer_state, load_random_state, optimizer_state, random_state
from .timestep_sampling import UniformSampler
from .validation import validation_loss
from .watch import Interruption, OnRead, Progress, Stopwatch

_COUNTS = ("step", "steps", "batches")


class Trainer:
    """Trains a model on batches of data.

    Under ``torchrun`` the same script trains in all its processes: each works on its part of every
    batch, and gradients are averaged (DDP); with ``sharding="fsdp"`` the weights are spread over
    the processes too (FSDP2), in place, see :mod:`.distributed`. Random numbers are those of one
    process with the whole batch. The first process alone writes checkpoints, which any number of
    processes can resume, and calls ``on_read``.

    Args:
        model: an ``nn.Module`` called as ``model(x_t, t)`` or ``model(x_t, t, context)``; batches
            go to the device of its parameters.
        dataloader: anything that can be iterated again and again and yields batches: x_0, (x_0,),
            (x_0, context) with a tensor or a dict of tensors as context, or (x_0, context, weight).
            The weight multiplies the squared error: [B], one for each image, or a mask that is
            broadcast to x_0. To resume, and for several processes, a
            :class:`~diffusion_fast.training.Batches`.
        schedule: the noise schedule.
        null_context: what stands for no condition, for ``condition_dropout``.
        seed: random seed of timesteps, noise and dropout; None draws from the global generator.
        timestep_sampler: which timesteps to train on, made for the T of the schedule; uniform by
            default.
        validation: batches that are not trained on, for the validation loss. It is that of the
            averaged weights where there are any.
        checkpoints: where to save; None for nowhere.
        about: what else decides the numbers of a run, as JSON can hold it, such as a hash of the
            weights that are not trained: it is saved, and a run that is resumed must have the same.
        rate_of: learning rate of the parameter of a name, as a multiple of the one in ``options``;
            None for 1.
        options: fields of :class:`TrainingOptions`.

    Raises:
        ValueError: arguments that don't fit together, or a batch size that the processes can't
            share evenly.

    Examples:
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> data = [torch.randn(8, 3) for _ in range(4)]
        >>> trainer = df.Trainer(Model(3, 3), data, df.DiffusionSchedule(), ema_decay=0.9, seed=0)
        >>> len(trainer.fit(6))
        6
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        schedule: DiffusionSchedule,
        *,
        null_context: Context = None,
        seed: int | None = None,
        timestep_sampler: UniformSampler | None = None,
        validation: Iterable[Any] | None = None,
        checkpoints: Checkpoints | None = None,
        about: Mapping[str, Any] | None = None,
        rate_of: Callable[[str], float] | None = None,
        **options: Any,
    ) -> None:
        self.about = dict(about or {})
        self.model, self.dataloader, self.schedule = model, dataloader, schedule
        self.options = TrainingOptions(**options)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            checks.fail("model", "at least one parameter that requires a gradient", "none")
        self.device, self.model_name = parameters[0].device, type(model).__name__
        self.processes = Processes.join(self.device)
        if self.options.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.seed = seed
        self.objective = Objective(
            model,
            schedule,
            self.options,
            device=self.device,
            processes=self.processes,
            null_context=null_context,
            seed=seed,
            timestep_sampler=timestep_sampler,
            batch_size=dataloader.batch_size if isinstance(dataloader, Batches) else 0,
        )
        if isinstance(dataloader, Batches):
            dataloader.check_shared(self.processes)
        elif self.processes.count > 1:
            wanted = "a training.Batches, for several processes"
            checks.fail("dataloader", wanted, type(dataloader).__name__)
        groups: dict[float, list[nn.Parameter]] = {}  # sharded by now, if they are
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rate_of(name) if rate_of else 1.0, []).append(parameter)
        self.optimizer = make_optimizer(
            self.options.optimizer,
            [{"params": group, "factor": factor} for factor, group in groups.items()],
            self.options.learning_rate,
            self.options.weight_decay,
        )
        self.scaler: torch.amp.GradScaler | None = None
        if self.options.precision == "float16":
            self.scaler = torch.amp.GradScaler(self.device.type)
        self.ema = EMA(model, decay) if (decay := self.options.ema_decay) is not None else None
        self._finite = {n for n, value in named_tensors(model).items() if is_finite(value)}
        self.validation, self.checkpoints = validation, checkpoints
        self.step, self.steps = 0, 0  # done in this run, and all of it
        self.batches = 0  # read in all runs
        self.losses: list[float] = []  # of this run
        self._resumed: str | None = None
        self._rehearsals = Rehearsals(model, self.objective)
        self._turns = Turns("Trainer")
        if self.device.type == "cpu":
            cpu_kernels.begin()
            warn_of_threads()

    @property
    def null_context(self) -> Context:
        """What stands for no condition."""
        return self.objective.null_context

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of timesteps, noise and dropout; None stands for PyTorch's global one."""
        return self.objective.generator

    def fit(self, steps: int, on_read: OnRead | Sequence[OnRead] | None = None) -> list[float]:
        """Train for a number of steps, going round the data as often as that needs.

        After :meth:`resume` the steps done before count as done.

        Args:
            steps: batches to train on.
            on_read: called with the progress whenever the losses are read: every ``read_every``
                steps, at validations and checkpoints, and after the last step. Or several such
                functions. One with a true attribute ``collective`` is called in all processes, as
                it has to be to run a sharded model.

        Returns:
            The loss of every step.

        Raises:
            FloatingPointError: the loss stopped being finite; names the first such step and its
                batch. Checkpoints saved before it are kept, and none is saved after it.
            KeyboardInterrupt: Ctrl-C; with ``checkpoints``, after the step was finished and saved.
            RuntimeError: called from ``on_read``.
            ValueError: an empty dataloader, a batch that doesn't fit the model, or a folder of
                checkpoints that holds newer ones.
        """
        checks.positive_int("steps", steps)
        callbacks = (on_read,) if callable(on_read) else tuple(on_read or ())
        was_training = self.model.training
        pending: list[Tensor] = []
        try:
            with self._turns, Interruption(self.checkpoints is not None) as interruption:
                self._start(steps)
                self.model.train()
                self._watch = Stopwatch()
                batches = self._batches()
                while self.step < steps:
                    with self._watch.waiting():
                        batch = next(batches)
                    with self._rehearsals.ready(batch):
                        pending.append(self._step(batch))
                    # Several processes must agree to stop, which they do where all pause.
                    alone = interruption.asked and self.processes.count == 1
                    if alone or self._pauses():
                        self._read(pending)
                        self._pause(callbacks, interruption)
        finally:
            self.model.train(was_training)
        return self.losses

    def resume(self, path: AnyPath | None = None, ignore: Iterable[str] = ()) -> int:
        """Go on where a checkpoint was saved: the next :meth:`fit` does the steps after it.

        On a CPU, what follows is bit for bit what would have followed without the interruption.

        Args:
            path: a checkpoint; None for the newest of ``checkpoints``.
            ignore: names of settings that may differ, such as ``"learning_rate"``.

        Returns:
            The step; 0 if ``path`` is None and there is no checkpoint yet.

        Raises:
            CheckpointError: it is missing, unfinished, damaged, or of another model; names the
                file.
            ValueError: it was made with other settings; lists what differs.
        """
        if path is None:
            if self.checkpoints is None:
                checks.fail("path", "a checkpoint, because the trainer has no checkpoints", None)
            path = self.checkpoints.newest()
            if path is None:
                return 0
        if not isinstance(self.dataloader, Batches):
            wanted = "a training.Batches, which can start in the middle, to resume"
            checks.fail("dataloader", wanted, type(self.dataloader).__name__)
        groups, saved = read_checkpoint(path)
        if not isinstance(saved.get("settings"), Mapping):
            raise CheckpointError(f"{path}: damaged: expected settings in its state")
        compare_settings(saved["settings"], self.settings(), ignore, str(path))
        try:
            self._load(groups, saved, str(path))
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            message = f"{path}: damaged, or of another program: {type(error).__name__}: {error}"
            raise CheckpointError(message) from error
        self._resumed = str(path)
        return self.step

    def _start(self, steps: int) -> None:
        """A run of its own, or the rest of the one that was resumed."""
        if self._resumed is None:
            self.step, self.losses = 0, []
        elif steps < self.step or (self.options.decay == "cosine" and steps != self.steps):
            # The cosine's length is part of every step so far.
            wanted = f"{self.steps}, as for {self._resumed}"
            checks.fail("steps", wanted, steps)
        self.steps, self._resumed = steps, None
        self._rates = self._schedule()
        newest = self.checkpoints.newest() if self.checkpoints else None
        if self.checkpoints and newest and newest > self.checkpoints.path(self.step):
            wanted = f"none after step {self.step} (call resume(), or take another folder)"
            checks.fail("checkpoints", wanted, newest)
        if self.device.type == "cpu":
            cpu_kernels.settle()  # before the first step, none of which waits

    def _batches(self) -> Iterator[Any]:
        if isinstance(self.dataloader, Batches):
            return self.dataloader.starting_at(self.batches, self.processes)
        return forever(self.dataloader)

    def _step(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective.backward(batch, self.scaler.scale if self.scaler else None)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.options.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        if self.scaler:
            self.scaler.step(self.optimizer)  # unless a gradient has overflowed
            self.scaler.update()
        else:
            self.optimizer.step()
        self._rates.step()
        if self.ema is not None:
            self.ema.update()
        self.step, self.batches = self.step + 1, self.batches + 1
        return loss

    def _schedule(self) -> LambdaLR:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.options.learning_rate * group["factor"]
        return LambdaLR(self.optimizer, self._rate, last_epoch=self.step - 1)  # which takes a step

    def _rate(self, done: int) -> float:
        """Learning rate of the next step, of its peak: warm-up, then constant or a half cosine."""
        warmup, step = self.options.warmup_steps, done + 1
        if step < warmup:
            return step / warmup
        if self.options.decay == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def _pauses(self) -> bool:
        """Whether something other than training is due after this step."""
        due = self.step % self.options.read_every == 0 or self.step == self.steps
        return due or self._validates() or self._saves()

    def _validates(self) -> bool:
        every = self.options.validate_every
        if self.validation is None:
            return False
        return (every is not None and self.step % every == 0) or self._saves()

    def _saves(self) -> bool:
        if self.checkpoints is None:
            return False
        return self.step % self.checkpoints.every == 0 or self.step == self.steps

    def _read(self, pending: list[Tensor]) -> None:
        """Bring the losses to the host, the mean of all processes."""
        losses: list[float] = self.processes.mean(torch.stack(pending)).tolist()
        for offset, loss in enumerate(losses, 1 - len(losses)):
            if not math.isfinite(loss):
                step, number = self.step + offset, self.batches + offset - 1
                message = f"loss: expected a finite number, got {loss} at step {step}"
                if isinstance(self.dataloader, Batches):
                    items = self.dataloader.items(number)
                    message += f", on batch {number} (items {', '.join(map(str, items))})"
                raise FloatingPointError(message)
        self.losses += losses
        pending.clear()

    def _pause(self, callbacks: tuple[OnRead, ...], interruption: Interruption) -> None:
        stops = self.processes.any(interruption.asked, self.device)
        saves, validated = stops or self._saves(), None
        if self.validation is not None and (saves or self._validates()):
            validated = self.validation_loss()
        progress = Progress(
            *(self.step, self.steps, self.losses[-1], self.losses, validated),
            self._watch.share(),
        )
        for callback in callbacks:
            if self.processes.first or getattr(callback, "collective", False):
                callback(progress)
        if saves:
            path = self._save(validated)
        if stops:
            raise KeyboardInterrupt(
                f"stopped after step {self.step} of {self.steps} and saved {path}; to go on, run"
                " the same again and resume"
            )

    def validation_loss(self) -> float:
        """See :func:`validation_loss`; of the averaged weights where there are any."""
        assert self.validation is not None
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            return validation_loss(
                self.model,
                self.validation,
                self.schedule,
                prediction_type=self.options.prediction_type,
                processes=self.processes,
                precision=self.options.precision,
            )

    def _save(self, validated: float | None) -> Path:
        assert self.checkpoints is not None
        self._check_finite()
        groups, saved = self.state()
        if self.processes.first:
            self.checkpoints.save(self.step, groups, saved, validated)
        self.processes.wait()
        return self.checkpoints.path(self.step)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All that a run consists of: tensors by group and name, and the rest as JSON can hold it.

        Every process has to call this. Tensors of a sharded model are whole in the first one, and
        empty in the others.
        """
        groups = {
            "model": named_tensors(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "random": random_state(self.processes, self.device, self.generator),
            "run": {"losses": torch.tensor(self.losses, dtype=torch.float64)},
            "timesteps": self.objective.timestep_sampler.state_dict(),
        }
        rest: dict[str, Any] = {
            **{"step": self.step, "steps": self.steps, "batches": self.batches},
            **{"threads": torch.get_num_threads(), "settings": self.settings()},
            **self._rehearsals.state_dict(),
        }
        if self.scaler is not None:
            rest["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            groups["ema"], rest["ema_updates"] = self.ema.state_dict(), self.ema.updates
        return {name: whole(group, self.processes) for name, group in groups.items() if group}, rest

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a run, as JSON can hold it."""
        betas, parameters = self.schedule.betas, list(self.model.parameters())
        values = self.options.settings() | {
            "model": f"{self.model_name}, {sum(p.numel() for p in parameters)} parameters",
            "schedule": f"{self.schedule!r}, checksum {zlib.crc32(betas.numpy().tobytes()):08x}",
            "seed": self.seed,
            "timestep_sampler": self.objective.timestep_sampler.settings(),
        }
        if isinstance(self.dataloader, Batches):
            values["data"] = self.dataloader.settings()
        return values | self.about

    def _load(self, groups: Groups, rest: Mapping[str, Any], origin: str) -> None:
        """Go on from :meth:`state`."""
        names = _COUNTS if self.ema is None else (*_COUNTS, "ema_updates")
        numbers = {name: _count(rest.get(name), f"{origin}: {name}") for name in names}
        losses: list[float] = groups["run"]["losses"].tolist()
        if len(losses) != numbers["step"]:
            raise CheckpointError(f"{origin}: step: expected {len(losses)}, got {numbers['step']}")
        targets = {"model": named_tensors(self.model)}
        if self.ema is not None:
            targets["ema"] = self.ema.state_dict()
        sampler = self.objective.timestep_sampler
        for group, target in (*targets.items(), ("timesteps", sampler.state_dict())):
            compare_tensors(group, target, groups.get(group, {}), origin)
        for group, target in targets.items():
            for name, value in groups[group].items():
                fill(target[name], value)
        if self.ema is not None:
            self.ema.updates = numbers["ema_updates"]
        load_optimizer_state(self.model, self.optimizer, groups.get("optimizer", {}))
        load_random_state(self.processes, self.device, self.generator, groups["random"])
        sampler.load_state_dict(dict(groups.get("timesteps", {})))
        if self.scaler is not None:
            self.scaler.load_state_dict(rest["scaler"])
        self._rehearsals.load_state_dict(rest, origin)
        self.losses, self.step = losses, numbers["step"]
        self.steps, self.batches = numbers["steps"], numbers["batches"]

    def _check_finite(self) -> None:
        """What was finite at the start still is; all processes stop together."""
        groups = {"model": named_tensors(self.model)}
        if self.ema is not None:
            groups["ema"] = self.ema.state_dict()
        error: FloatingPointError | None = None
        try:
            check_finite(
                {g: {n: local(t[n]) for n in t if n in self._finite} for g, t in groups.items()}
            )
        except FloatingPointError as found:
            error = found
        if self.processes.any(error is not None, self.device):
            raise error or FloatingPointError("model: expected finite numbers in all processes")

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers to sample with, whole: averaged where there are averages.

        Every process has to call this. Of a sharded model only the first gets them, in the memory
        of its host; the others get empty tensors.
        """
        tensors = self.ema.state_dict() if self.ema else named_tensors(self.model)
        return whole(tensors, self.processes)


def _count(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{name}: expected a number of at least 0, got {value!r}")
    return value


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
        options: keywords of :class:`Trainer`, and fields of :class:`TrainingOptions`.

    Returns:
        The loss of every step.

    Examples:
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> data = [torch.randn(8, 3) for _ in range(4)]
        >>> losses = df.train_diffusion(Model(3, 3), data, df.DiffusionSchedule(), epochs=2)
        >>> len(losses)
        8
    """
    checks.positive_int("epochs", epochs)
    if not isinstance(dataloader, Sized):
        raise TypeError("dataloader: expected one with a length; Trainer.fit(steps) takes any")
    if not len(dataloader):
        checks.fail("dataloader", "at least one batch", "none")
    return Trainer(model, dataloader, schedule, **options).fit(epochs * len(dataloader))
