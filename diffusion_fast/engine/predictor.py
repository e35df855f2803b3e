"""The model as the loop calls it: prepared once per run, then asked row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..conditioning import Context, Model, PerRow, bind, contexts_of, form
from ..models import UNet2DCondition
from ..models.controlled import ControlledUNet
from ..ops import checks
from ..ops.cpu.contest import NO_WORK, Work
from .buffers import Clock, Order
from .rewrites.controlled import prepare
from .rewrites.derived import Executor, eagerly
from .rewrites.plan import LOSSY, REWRITES, Bypassed, RewriteReport


class Predictor(Protocol):
    """What the loop needs of a model.

    A captured graph bakes in addresses. So whatever ``__call__`` reads lies in tensors that keep
    theirs, and ``prepare`` writes in place. Contexts of another shape or dtype may have tensors of
    their own, but those of the shapes before must stay as they are.
    """

    def prepare(
        self, context: Context | PerRow, timesteps: Tensor, execute: Executor = eagerly
    ) -> None:
        """Before each run: everything that depends on the prompt or on the time grid only.

        Args:
            context: what the halves that run are conditioned on, batch [halves * B], as
                :func:`~diffusion_fast.conditioning.join_steps` gives it.
            timesteps: [R] on the device, int64 if all are whole, else float32.
            execute: how to do work that only reads and writes tensors which keep their addresses.
        """
        ...

    def __call__(self, x: Tensor, clock: Clock) -> Tensor:
        """The model's output [halves * B, C, ...] for its input at the clock's row."""
        ...

    @property
    def repeatable(self) -> bool:
        """Whether a step does nothing but compute, so that it may be called to be timed."""
        ...

    def refresh(self) -> None:
        """After the weights' values changed: derived tensors are computed again, in place."""
        ...

    def work(self, size: Sequence[int]) -> Work:
        """The op calls of a step, as far as they are known.

        Args:
            size: of x behind its channels.
        """
        ...

    def explain(self) -> Sequence[RewriteReport]:
        """A report of each rewrite: what it did and what it saves."""
        ...


class PlainPredictor:
    """Any ``model(x, t)``, ``model(x, t, context)`` or ``model(x, t, **context)``, as it is.

    For each shape of the context, and for whole and fractional timesteps, it has own tensors.

    Args:
        model: the callable. It may only read x and t, which are the loop's own tensors.
        batch: number of its inputs, halves * B.
        max_rows: largest number of rows of the tables to come.
        why: reason for using no rewrite, for :meth:`explain`; None where there is nothing to
            rewrite.
    """

    repeatable = False  # nobody knows what a model does beside

    def __init__(self, model: Model, *, batch: int, max_rows: int, why: str | None = None) -> None:
        self.model, self.batch, self.max_rows, self.why = model, batch, max_rows, why
        self._contexts: dict[Any, Context] = {}
        self._context: Context = None  # of this run, or all of its contexts joined
        self._orders: dict[torch.device, Order] = {}
        self._order: Order | None = None
        self._times: dict[torch.dtype, tuple[Tensor, Sequence[Tensor]]] = {}
        self._t = torch.empty(0)  # of the time grid now
        self._t_of_row: Sequence[Tensor] = ()

    def prepare(
        self, context: Context | PerRow, timesteps: Tensor, execute: Executor = eagerly
    ) -> None:
        device = timesteps.device
        if device not in self._orders:
            self._orders[device] = Order(self.max_rows, device)
        self._order = self._orders[device]
        self._order.take(context)
        joined = self._order.join(contexts_of(context))
        key = signature(context)
        if key not in self._contexts:
            self._contexts[key] = _empty_like(joined)
        self._context = self._contexts[key]
        _copy(self._context, joined)
        if timesteps.dtype not in self._times:
            times = timesteps.new_zeros(self.max_rows, self.batch)
            self._times[timesteps.dtype] = times, times.unbind()
        self._t, self._t_of_row = self._times[timesteps.dtype]
        self._t[: len(timesteps)] = timesteps[:, None]

    def __call__(self, x: Tensor, clock: Clock) -> Tensor:
        t = clock.pick(self._t) if clock.counts_on_device else self._t_of_row[clock.row]
        x_version, t_version = x._version, t._version
        context = self._order.pick(self._context, clock) if self._order else self._context
        output = bind(self.model, context)(x, t)
        if x._version != x_version or t._version != t_version:
            changed = "x" if x._version != x_version else "t"
            checks.fail(
                "model",
                f"one that leaves {changed} as it is",
                f"one that changes it in place (give it {changed}.clone())",
            )
        return output

    def refresh(self) -> None:
        """Nothing is derived from the weights."""

    def work(self, size: Sequence[int]) -> Work:
        """Nobody knows what a model calls."""
        return NO_WORK

    def explain(self) -> Sequence[RewriteReport]:
        if not self.why:
            return []
        return [RewriteReport(name, False, self.why) for name in (*REWRITES, *LOSSY)]


def predictor_for(
    model: Model, rewrites: str | Sequence[str], *, batch: int, halves: int, max_rows: int
) -> Predictor:
    """The fastest predictor for a model.

    Args:
        model: as :class:`~diffusion_fast.Engine` takes it.
        rewrites: the rewrites of a U-Net to use: ``"all"`` exact ones, ``"none"`` or names. A U-Net
            with hooks on anything but its layers has none for ``"all"``, and they say why.
        batch: number of images, without the halves of guidance.
        halves: how many halves of guidance run in one call, 1 or 2.
        max_rows: largest number of rows of the tables to come.

    Raises:
        ValueError: rewrites asked for by name that don't exist, or that the model can't have.
    """
    why: str | None = None
    if isinstance(model, (UNet2DCondition, ControlledUNet)) and rewrites != "none":
        try:
            return prepare(model, batch=batch, halves=halves, max_rows=max_rows, rewrites=rewrites)
        except Bypassed as error:
            if rewrites != "all":
                raise
            why = f"a hook on {error.place!r}, or a forward of its own, would not run"
    if rewrites not in ("all", "none"):
        kind = f"{type(model).__name__}, which is no UNet2DCondition"
        checks.fail("rewrites", f"'all' or 'none' for a model of type {kind}", repr(rewrites))
    return PlainPredictor(model, batch=halves * batch, max_rows=max_rows, why=why)


def signature(context: Context | PerRow) -> Any:
    """How many contexts there are, and their form: hashable."""
    contexts = contexts_of(context)
    return len(contexts), form(contexts[0])


def _empty_like(context: Context) -> Context:
    empty: Context = tree_map_only(Tensor, lambda x: torch.empty_like(x.contiguous()), context)
    return empty


def _copy(kept: Context, context: Context) -> None:
    for old, new in zip(tree_leaves(kept), tree_leaves(context), strict=True):
        if new is not None:
            old.copy_(new)
