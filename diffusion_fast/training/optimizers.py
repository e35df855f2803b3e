"""Optimizers by name: PyTorch's own, and those of packages that may be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

OPTIMIZERS = ("adamw", "adam", "adafactor", "adamw8bit", "prodigy")


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
        ModuleNotFoundError: the package of the optimizer is missing; names the command.
    """
    usual: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in ("adamw", "adam"):
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
        parameters = [p for group in groups for p in group["params"]]
        return kind(groups, fused=all(p.is_floating_point() for p in parameters), **usual)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, **usual)
    if name == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ModuleNotFoundError as error:
            message = "optimizer: prodigy is a package of its own: pip install prodigyopt"
            raise ModuleNotFoundError(message) from error
        # As its authors set it for diffusion models: steps grow during warm-up, not the estimate.
        prodigy: Optimizer = Prodigy(
            groups, safeguard_warmup=True, use_bias_correction=True, **usual
        )
        return prodigy
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        message = "optimizer: adamw8bit is part of bitsandbytes: pip install bitsandbytes"
        raise ModuleNotFoundError(message) from error
    eight: Optimizer = AdamW8bit(groups, **usual)
    return eight
