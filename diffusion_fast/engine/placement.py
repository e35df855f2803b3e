"""Where a model lives, in what dtype, and the mode it runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..conditioning import Model
from ..ops import checks


def device_of(model: Model, device: torch.device | str | None) -> torch.device:
    """The device asked for, or that of the model's parameters; they must be the same."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if device is None:
        return parameter.device if parameter is not None else torch.device("cpu")
    try:
        device = torch.empty(0, device=device).device  # "cuda" is the current one, such as cuda:0
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that works, got {device!r}: {reason}") from error
    if parameter is not None and parameter.device != device:
        checks.fail("device", f"the device of the model's parameters ({parameter.device})", device)
    return device


def dtype_of(model: Model) -> torch.dtype:
    """The dtype of the model's first floating parameter; float32 without one."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Eval mode for the time of a run; every module gets back the mode that it had."""
    modules = list(model.modules()) if isinstance(model, nn.Module) and model.training else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
