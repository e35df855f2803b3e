"""Optimizers by name: PyTorch's own, and those of packages that may be installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..ops import checks

OPTIMIZERS = ("adamw", "adam", "adafactor", "adamw8bit", "prodigy")
_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # of those that need one
_ON_GPUS = ("adamw8bit",)
# What the first two keep of a weight can't be cut as it is. The last sums over all weights: each
# process would sum over its own ones, and go by a step size of its own.
_OF_WHOLE_WEIGHTS = ("adafactor", "adamw8bit", "prodigy")


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise unless an optimizer can be made for parameters on a device.

    Raises:
        ModuleNotFoundError: its package is missing; names the command.
        ValueError: it runs on GPUs alone, and the device is none.
    """
    if name in _ON_GPUS and device.type != "cuda":
        others = ", ".join(one for one in OPTIMIZERS if one not in _ON_GPUS)
        wanted = f"one of {others} on {device}, because {name} needs a GPU"
        checks.fail("optimizer", wanted, repr(name))
    if (package := _PACKAGES.get(name)) is None:
        return
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        message = f"optimizer: {name} is part of {package}: pip install {package}"
        raise ModuleNotFoundError(message) from error


def check_sharding(name: str, sharding: str) -> None:
    """Raise a ValueError if an optimizer can't step weights that are spread over processes."""
    if sharding == "fsdp" and name in _OF_WHOLE_WEIGHTS:
        checks.fail("sharding", f"ddp, because {name} takes whole weights", repr(sharding))


def make_optimizer(
    name: str, groups: Sequence[dict[str, Any]], learning_rate: float, weight_decay: float
) -> Optimizer:
    """An optimizer of parameter groups.

    Args:
        name: ``"adamw"`` (weight decay apart from the gradient; Loshchilov & Hutter 2019),
            ``"adam"`` (L2 within it; Kingma & Ba 2015), ``"adafactor"`` (moments of rows and
            columns only; Shazeer & Stern 2018), ``"adamw8bit"`` (moments in 8 bits; Dettmers et al.
            2022, of bitsandbytes), ``"prodigy"`` (finds its own step size, which
            ``learning_rate`` = 1 leaves alone; Mishchenko & Defazio 2024, of prodigyopt).
        groups: dicts with ``params``.
        learning_rate: step size at its peak.
        weight_decay: strength of weight decay.

    Raises:
        ModuleNotFoundError, ValueError: as :func:`check_optimizer` says.
    """
    parameters = [p for group in groups for p in group["params"]]
    check_optimizer(name, parameters[0].device)
    usual: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in ("adamw", "adam"):
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
        return kind(groups, fused=all(p.is_floating_point() for p in parameters), **usual)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, **usual)
    if name == "prodigy":
        from prodigyopt import Prodigy

        # As its authors set it for diffusion models: steps grow during warm-up, not the estimate.
        prodigy: Optimizer = Prodigy(
            groups, safeguard_warmup=True, use_bias_correction=True, **usual
        )
        return prodigy
    from bitsandbytes.optim import AdamW8bit

    eight: Optimizer = AdamW8bit(groups, **usual)
    return eight
