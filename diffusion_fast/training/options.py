"""How to train, checked."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import checks
from ..ops.add_noise import TARGETS
from .optimizers import OPTIMIZERS, check_sharding
from .weighting import LossWeighting

PRECISIONS = ("float32", "bfloat16", "float16")
SHARDINGS = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; every value is checked.

    Attributes:
        optimizer: ``"adamw"`` (weight decay apart from the gradient), ``"adam"`` (L2 within it) or
            another one of :func:`~diffusion_fast.training.optimizers.make_optimizer`.
        learning_rate: step size of the optimizer at its peak.
        weight_decay: strength of the optimizer's weight decay.
        warmup_steps: over which the rate rises from zero.
        decay: ``"constant"``, or ``"cosine"`` down to zero at the last step.
        gradient_clip: largest norm of the gradient; None for no limit.
        accumulate: parts that each batch is cut into, one after the other, when it doesn't fit into
            memory at once. The gradient stays that of the whole batch.
        ema_decay: share that averaged weights keep at each step; None for no averages.
        condition_dropout: share of conditions replaced by ``null_context`` (0.1 is usual).
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        loss_weighting: such as :class:`~diffusion_fast.training.MinSNR`; None for all alike.
        noise_offset: standard deviation of what is added to the noise of each channel as a whole,
            so that a model learns to change an image's brightness (Guttenberg 2023, "Diffusion with
            Offset Noise"): noise = eps + noise_offset * delta, delta ~ N(0, 1) for each image and
            channel. 0.05 to 0.1 is usual.
        input_perturbation: standard deviation of further noise in x_t that the target knows nothing
            of, against exposure bias (Ning et al. 2023, arXiv:2301.11706, algorithm 1): x_t =
            sqrt(abar) x_0 + sqrt(1 - abar) (eps + input_perturbation * xi). 0.1 in the paper.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` for mixed precision: weights,
            their averages, the optimizer and the loss stay float32, the model runs under autocast.
            With float16 the loss is scaled so that gradients don't vanish (Micikevicius et al.
            2018, arXiv:1710.03740, section 3.2), and a step whose gradients overflow is left out.
        channels_last: keep images and convolutions with the channels innermost.
        compile: run the model through ``torch.compile``.
        sharding: what several processes share: ``"ddp"`` the batches, each with the whole model;
            ``"fsdp"`` the model as well, for those whose gradients, moments and averages don't fit
            beside them into one process's memory. The model itself has to, to begin with.
        read_every: steps between two reads of the loss on the host.
        validate_every: steps between two validation losses; None for those at checkpoints only.
    """

    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    gradient_clip: float | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    condition_dropout: float = 0.0
    prediction_type: str = "epsilon"
    loss_weighting: LossWeighting | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    sharding: str = "ddp"
    read_every: int = 10
    validate_every: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
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
        checks.positive_int("accumulate", self.accumulate)
        if not 0 <= self.condition_dropout <= 1:
            checks.fail("condition_dropout", "a probability in [0, 1]", self.condition_dropout)
        checks.one_of("prediction_type", self.prediction_type, TARGETS)
        if self.loss_weighting is not None and not hasattr(self.loss_weighting, "table"):
            checks.fail("loss_weighting", "one such as MinSNR() or None", repr(self.loss_weighting))
        for name in ("noise_offset", "input_perturbation"):
            checks.finite(name, getattr(self, name))
            if getattr(self, name) < 0:
                checks.fail(name, "a number of at least 0", getattr(self, name))
        checks.one_of("precision", self.precision, PRECISIONS)
        checks.one_of("sharding", self.sharding, SHARDINGS)
        check_sharding(self.optimizer, self.sharding)
        if self.sharding == "fsdp" and self.channels_last:
            # FSDP2 cuts parameters that are contiguous only.
            checks.fail("channels_last", 'False, because of sharding="fsdp"', True)
        checks.positive_int("read_every", self.read_every)
        if self.validate_every is not None:
            checks.positive_int("validate_every", self.validate_every)

    def settings(self) -> dict[str, Any]:
        """What the weights depend on, as JSON can hold it; not when and by whom it is computed."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("read_every", "validate_every", "sharding"):
            del values[name]
        for name in ("noise_offset", "input_perturbation"):  # older checkpoints know neither
            if not values[name]:
                del values[name]
        if self.loss_weighting is not None:
            values["loss_weighting"] = repr(self.loss_weighting)
        return values


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """What the model's forward pass runs in."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
