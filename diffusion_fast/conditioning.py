"""The model's contract, and what both halves of guidance are conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import checks

Value = Tensor | Sequence[Tensor]
Context = Tensor | Mapping[str, Any] | None  # of a Value each
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class PerStep:
    """Contexts that take turns: another one at some steps of a run.

    ``df.sample(model, schedule, shape, context=df.PerStep([cat, dog], [0, 0, 1, 1]), steps=4)``
    is conditioned on ``cat`` in the first two steps.

    Attributes:
        contexts: those there are, alike in form: the same keywords, shapes and dtypes.
        order: for each step which of them it is, from 0. Samplers that call the model twice in a
            step have it for both calls.

    Raises:
        ValueError: no context, or a number in ``order`` that has none.

    Examples:
        >>> cat, dog = torch.zeros(1, 4), torch.ones(1, 4)
        >>> turns = df.PerStep([cat, dog], [0, 0, 1])
        >>> options = {"sampler": "ddim", "steps": 3, "context": turns}
        >>> df.sample(lambda x, t, context: x, df.DiffusionSchedule(), (2, 3), **options).shape
        torch.Size([2, 3])
    """

    contexts: Sequence[Context]
    order: Sequence[int]

    def __post_init__(self) -> None:
        if not self.contexts:
            checks.fail("contexts", "at least one", list(self.contexts))
        for one in self.order:
            checks.whole_between("order", one, 0, len(self.contexts) - 1)


@dataclass(frozen=True)
class PerRow:
    """The same for the model calls of a run; what the loop asks a model's predictor to prepare.

    Attributes:
        contexts: of the halves that run, as :func:`join_halves` joins them.
        order: for each row of the sampler's table which of them it is.
    """

    contexts: Sequence[Context]
    order: Sequence[int]


def contexts_of(context: Context | PerRow) -> Sequence[Context]:
    """All contexts of a run."""
    return context.contexts if isinstance(context, PerRow) else [context]


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


def join_steps(
    context: Context | PerStep,
    null_context: Context | PerStep,
    halves: str,
    batch: int,
    step_of_row: Sequence[int],
) -> Context | PerRow:
    """What :func:`join_halves` joins; for each row where one of them is :class:`PerStep`.

    Args:
        context, null_context, halves, batch: as there.
        step_of_row: the step of each row of the sampler's table.

    Raises:
        ValueError: as there; an order for another number of steps, contexts of several forms.
    """
    if not isinstance(context, PerStep) and not isinstance(null_context, PerStep):
        return join_halves(context, null_context, halves, batch)
    steps = step_of_row[-1] + 1
    positive = _by_step("context", context, steps)
    negative = _by_step("null_context", null_context, steps)
    uncond, cond = halves != "conditional", halves != "unconditional"
    used = [(i * cond, k * uncond) for i, k in zip(positive.order, negative.order, strict=True)]
    distinct = list(dict.fromkeys(used))
    joined = [
        join_halves(positive.contexts[i], negative.contexts[k], halves, batch) for i, k in distinct
    ]
    for other in joined[1:]:
        if form(other) != form(joined[0]):
            checks.fail("context", f"one form at all steps, {form(joined[0])}", form(other))
    numbers = [distinct.index(pair) for pair in used]
    if len(joined) == 1:
        return joined[0]
    return PerRow(joined, [numbers[step] for step in step_of_row])


def by_row(name: str, context: Context | PerStep, step_of_row: Sequence[int]) -> list[Context]:
    """The context of each row of a sampler's table.

    Raises:
        ValueError: an order for another number of steps.
    """
    given = _by_step(name, context, step_of_row[-1] + 1)
    return [given.contexts[given.order[step]] for step in step_of_row]


def _by_step(name: str, context: Context | PerStep, steps: int) -> PerStep:
    if not isinstance(context, PerStep):
        return PerStep([context], [0] * steps)
    if len(context.order) != steps:
        checks.fail(f"{name}.order", f"one for each of {steps} steps", len(context.order))
    return context


def form(context: Context | Value) -> Any:
    """The keywords, shapes, dtypes and devices of a context: hashable."""
    if isinstance(context, Mapping):
        return tuple((name, form(value)) for name, value in sorted(context.items()))
    if isinstance(context, (list, tuple)):
        return tuple(map(form, context))
    assert isinstance(context, Tensor | None)
    return None if context is None else (tuple(context.shape), context.dtype, context.device)


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
