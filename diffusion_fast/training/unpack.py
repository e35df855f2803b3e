"""What a dataloader yields, on the device of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Context
from ..ops import checks


def forever(dataloader: Iterable[Any]) -> Iterator[Any]:
    """Pass after pass.

    Raises:
        ValueError: a pass without batches.
    """
    while True:
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            checks.fail("dataloader", "at least one batch in every pass", "none")


def unpacked(batch: Any, device: torch.device) -> tuple[Tensor, Context]:
    """x_0 and the context (or None) of a batch: x_0, (x_0,) or (x_0, context)."""
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        x_0, context = batch[0], batch[1] if len(batch) == 2 else None
    else:
        x_0, context = batch, None
    if not isinstance(x_0, Tensor):
        got = type(batch).__name__
        raise TypeError(f"dataloader: expected batches x_0 or (x_0, context), got a {got}")
    return x_0.to(device, non_blocking=True), moved(context, device)


def moved(context: Context, device: torch.device) -> Context:
    """The context on a device."""
    if isinstance(context, Mapping):
        return {key: value.to(device, non_blocking=True) for key, value in context.items()}
    return context.to(device, non_blocking=True) if context is not None else None


def split(x_0: Tensor, context: Context, parts: int) -> list[tuple[slice, Tensor, Context]]:
    """A batch in nearly equal parts, none of them empty, with the rows that each holds."""
    rows = [chunk for chunk in torch.arange(len(x_0)).tensor_split(parts) if len(chunk)]
    spans = [slice(int(chunk[0]), int(chunk[-1]) + 1) for chunk in rows]
    if isinstance(context, Mapping):
        return [(s, x_0[s], {key: value[s] for key, value in context.items()}) for s in spans]
    return [(s, x_0[s], None if context is None else context[s]) for s in spans]
