"""Which of several contexts a row of a run has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from ..conditioning import Context, PerRow
from .buffers import Clock


def contexts_of(context: Context | PerRow) -> Sequence[Context]:
    """All contexts of a run."""
    return context.contexts if isinstance(context, PerRow) else [context]


class Order:
    """The number of each row's context, at an address that captured graphs may read.

    Args:
        max_rows: the most rows of the tables to come.
        device: where the model runs.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._order: Sequence[int] = ()  # empty where all rows have the same
        self._on_device = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def take(self, context: Context | PerRow) -> None:
        """Know the order of a run's contexts."""
        several = len(contexts_of(context)) > 1
        self._order = context.order if several and isinstance(context, PerRow) else ()
        self._on_device[: len(self._order)] = torch.tensor(self._order, dtype=torch.int64)

    def join(self, made: Sequence[Any]) -> Any:
        """Nested tensors of each context as one, [contexts, ...] of each if there are several."""
        if not self._order:
            return made[0]
        return tree_map(lambda *x: torch.stack(x) if isinstance(x[0], Tensor) else x[0], *made)

    def pick(self, joined: Any, clock: Clock) -> Any:
        """Those of the clock's row: views, or copied by the device's counter."""
        if not self._order:
            return joined
        if clock.counts_on_device:
            number = self._on_device.index_select(0, clock.counter)
            return tree_map_only(Tensor, lambda x: x.index_select(0, number)[0], joined)
        row = self._order[clock.row]
        return tree_map_only(Tensor, lambda x: x[row], joined)
