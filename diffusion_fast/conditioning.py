"""The model's contract, and what both halves of guidance are conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import checks

Value = Tensor | Sequence[Tensor]
Context = Tensor | Mapping[str, Any] | None  # of a Value each
Model = Callable[..., Tensor]


def bind(model: Model, context: Context) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of x and t: ``model(x, t)``, ``model(x, t, context)`` or keywords."""
    if context is None:
        return model
    if isinstance(context, Mapping):
        keywords = dict(context)
        return lambda x, t: model(x, t, **keywords)
    return lambda x, t: model(x, t, context)


def _widened(name: str, value: Tensor, batch: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() < 1 or value.shape[0] not in (1, batch):
        checks.fail(name, f"a batch of {batch} (or 1)", list(value.shape))
    return value.expand(batch, *value.shape[1:])


def join_halves(context: Context, null_context: Context, halves: str, batch: int) -> Context:
    """The context of the halves that run, the unconditional one first.

    Args:
        context: a tensor [B, ...], a dict of them, or of lists of them, or None.
        null_context: the same for the unconditional half.
        halves: which run: ``"conditional"``, ``"unconditional"`` or ``"both"``.
        batch: B; contexts with a batch of 1 serve all of it.

    Raises:
        ValueError: guidance without what it needs, or contexts that don't match.
    """
    uncond, cond = halves != "conditional", halves != "unconditional"
    if uncond and null_context is None:
        checks.fail(
            "null_context",
            "what the unconditional half of guidance sees, as guidance_scale is not 1 or for CFG++",
            None,
        )
    if uncond and cond and context is None:
        checks.fail("context", "a context to guide towards, because guidance_scale is not 1", None)
    parts = [("null_context", null_context)] * uncond + [("context", context)] * cond
    first = parts[0][1]
    if first is None:
        return None
    if not isinstance(first, Mapping):
        return _joined(parts, batch)
    keys = first.keys()
    named: dict[str, list[tuple[str, Any]]] = {key: [] for key in keys}
    for name, part in parts:
        if not isinstance(part, Mapping) or part.keys() != keys:
            got = sorted(part) if isinstance(part, Mapping) else type(part).__name__
            checks.fail(name, f"a dict with the keys {sorted(keys)}", got)
        for key in keys:
            named[key].append((f"{name}[{key!r}]", part[key]))
    return {key: _joined_lists(values, batch) for key, values in named.items()}


def _joined_lists(parts: list[tuple[str, Any]], batch: int) -> Value:
    """The same of lists, item by item."""
    if not any(isinstance(value, (list, tuple)) for _, value in parts):
        return _joined(parts, batch)
    name, first = parts[0]
    for other, value in parts:
        if not isinstance(value, (list, tuple)) or len(value) != len(first):
            got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
            checks.fail(other, f"a list of {len(first)} tensors, as {name}", got)
    items = range(len(first))
    return [_joined([(f"{n}[{i}]", value[i]) for n, value in parts], batch) for i in items]


def _joined(parts: list[tuple[str, Any]], batch: int) -> Tensor:
    values = [_widened(name, value, batch) for name, value in parts]
    first = values[0]
    for (name, _), value in zip(parts[1:], values[1:], strict=True):
        if value.shape != first.shape or value.dtype != first.dtype:
            checks.fail(
                name,
                f"the shape and dtype of {parts[0][0]} ({list(first.shape)}, {first.dtype})",
                f"{list(value.shape)}, {value.dtype}",
            )
        checks.same_device(name, value, parts[0][0], first)
    return torch.cat(values) if len(values) > 1 else first
