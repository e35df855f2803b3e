"""One batch to the gradient of the loss: all that is random and all that is weighted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import ops
from ..conditioning import Context
from ..kernels.layout import channels_last
from ..ops import checks
from ..schedule import DiffusionSchedule
from .batches import moved, split, unpacked
from .distributed import Processes, shard
from .gradient import Gradient
from .loss import image_mse, predict, replace_condition
from .options import TrainingOptions, autocast
from .timestep_sampling import UniformSampler


class Objective:
    """The training loss of a model and its gradient.

    Arguments as for :class:`~diffusion_fast.training.Trainer`; ``device`` is that of the model.
    ``batch_size`` is that of whole batches, for which random numbers are always drawn: a smaller
    batch leaves the rest of them, so that what follows does not depend on the processes that share
    it.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: DiffusionSchedule,
        options: TrainingOptions,
        *,
        device: torch.device,
        processes: Processes,
        null_context: Context = None,
        seed: int | None = None,
        timestep_sampler: UniformSampler | None = None,
        batch_size: int = 0,
    ) -> None:
        if options.condition_dropout > 0 and null_context is None:
            checks.fail("null_context", "a null condition, because of condition_dropout", None)
        if processes.count > 1 and seed is None:
            wanted = "a number, because all processes draw the same timesteps and noise"
            checks.fail("seed", wanted, None)
        if options.prediction_type == "epsilon" and schedule.alpha_bar[-1] == 0:
            wanted = "v_prediction or sample, because the schedule ends at zero SNR"
            checks.fail("prediction_type", wanted, "epsilon, which says nothing about x_0 there")
        self.schedule, self.options, self.device = schedule, options, device
        self.processes, self.batch_size = processes, batch_size
        self.null_context = moved(null_context, device)
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)
        self.timestep_sampler = timestep_sampler or UniformSampler(schedule.timesteps)
        if self.timestep_sampler.timesteps != schedule.timesteps:
            wanted = f"one for the {schedule.timesteps} timesteps of the schedule"
            checks.fail("timestep_sampler", wanted, self.timestep_sampler.timesteps)
        self.timestep_sampler.to(device)
        self._loss_weights: Tensor | None = None  # [T]
        if options.loss_weighting is not None:
            table = options.loss_weighting.table(schedule, options.prediction_type)
            self._loss_weights = table.to(device)
        self._parallel: DistributedDataParallel | None = None
        if processes.count > 1 and options.sharding == "fsdp":
            shard(model, processes, device)
        elif processes.count > 1:
            # Some models have parameters that a batch, or all batches, leave out of the loss.
            self._parallel = DistributedDataParallel(model, find_unused_parameters=True)
        network = self._parallel or model
        self._network = torch.compile(network) if options.compile else network
        # Several parts would take the memory of a second gradient.
        alone = processes.count == 1 and options.accumulate == 1 and not options.compile
        self.channels_last = options.channels_last  # the layout of images, see .rehearsal
        self._gradient: Gradient | None = None
        if alone and device.type == "cpu":
            self._gradient = Gradient(model, self._loss)

    def backward(self, batch: Any, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Add the batch's gradient to the parameters'; its loss, a scalar of this process.

        ``scale`` makes of the loss what the gradient is taken of; None for the loss itself.
        Every process draws for the batch of all, and keeps its part: see :mod:`.distributed`.
        """
        x_0, context, emphasis = self.unpacked(batch)
        joint = len(x_0) * self.processes.count
        drawn = max(joint, self.batch_size)

        def part(values: Tensor) -> Tensor:
            return self.processes.part(values[:joint])

        context = self._drop(context, joint)
        all_t, importance = self.timestep_sampler.sample(drawn, self.device, self.generator)
        t = part(all_t)
        weight = self._weight(t, None if importance is None else part(importance))
        noise, perturbed = self._noise(x_0, drawn)
        noise, perturbed = part(noise), None if perturbed is None else part(perturbed)
        if emphasis is not None and emphasis.dim() == 1:
            weight = emphasis if weight is None else weight * emphasis
        root = emphasis.sqrt() if emphasis is not None and emphasis.dim() > 1 else None
        parts = split(x_0, context, self.options.accumulate)
        losses, squares = [], []
        for number, (rows, x, c) in enumerate(parts):
            of_images = t, noise, perturbed, weight, root
            own: list[Any] = [None if one is None else one[rows] for one in of_images]
            share = len(x) / len(x_0)
            if self._gradient is not None and scale is None:
                loss, square = self._gradient(x, c, share, *own)
            else:
                # Gradients are exchanged once, with the last part; but with FSDP at once, since
                # whole ones would take the memory that it saves.
                with self._alone() if number < len(parts) - 1 else contextlib.nullcontext():
                    loss, square = self._loss(x, c, share, *own)
                    (loss if scale is None else scale(loss)).backward()
            losses.append(loss.detach())
            squares += [] if square is None else [square]
        if squares:
            mine = torch.cat(squares)
            mine = mine if self._loss_weights is None else mine * self._loss_weights[t]
            self.timestep_sampler.update(all_t[:joint], self.processes.gather(mine))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def unpacked(self, batch: Any) -> tuple[Tensor, Context, Tensor | None]:
        """A batch on the device, see :func:`.batches.unpacked`, with its images laid out."""
        x_0, context, emphasis = unpacked(batch, self.device)
        if self.channels_last and x_0.dim() == 4:
            x_0 = channels_last(x_0)
        return x_0, context, emphasis

    def _loss(
        self,
        x_0: Tensor,
        context: Context,
        share: float,
        t: Tensor,
        noise: Tensor,
        perturbed: Tensor | None,
        weight: Tensor | None,
        root: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of a part of a batch, and where timesteps are learned its images' errors.

        ``share`` of the batch is in this part; ``root`` [B, ...] multiplies the error itself.
        """
        with autocast(self.device, self.options.precision):
            prediction, target = predict(
                *(self._network, self.schedule, x_0, context, t, noise),
                self.options.prediction_type,
                perturbed,
            )
        if root is not None:  # w (a - b)^2 = (sqrt(w) a - sqrt(w) b)^2
            prediction, target = prediction * root, target * root
        loss = ops.weighted_mse(prediction, target, weight)
        square = image_mse(prediction, target) if self.timestep_sampler.learns else None
        return loss if share == 1 else loss * share, square

    def _noise(self, x_0: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """The noise of ``count`` images, and that of their x_t where it is another."""

        def normal(*shape: int) -> Tensor:
            place = self.device
            return torch.randn(shape, generator=self.generator, dtype=x_0.dtype, device=place)

        shape = (count, *x_0.shape[1:])
        noise = normal(*shape)
        if offset := self.options.noise_offset:
            noise = noise + offset * normal(*shape[:2], *(1,) * (x_0.dim() - 2))
        if not (strength := self.options.input_perturbation):
            return noise, None
        return noise, noise + strength * normal(*shape)

    def _drop(self, context: Context, joint: int) -> Context:
        probability = self.options.condition_dropout
        if probability == 0:
            return context
        if context is None:
            wanted = "batches (x_0, context), because of condition_dropout"
            checks.fail("dataloader", wanted, "x_0 alone")
        draws = torch.rand(joint, generator=self.generator, dtype=torch.float32, device=self.device)
        return replace_condition(
            context, self.null_context, self.processes.part(draws) < probability
        )

    def _weight(self, t: Tensor, importance: Tensor | None) -> Tensor | None:
        """Loss weighting and importance weight together, [B]."""
        if self._loss_weights is None:
            return importance
        weight = self._loss_weights[t]
        return weight if importance is None else weight * importance

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return self._parallel.no_sync() if self._parallel else contextlib.nullcontext()
