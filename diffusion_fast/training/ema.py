"""An exponential moving average of a model's weights: what is sampled from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import checks


class EMA:
    """Keeps ``average <- decay * average + (1 - decay) * weight`` for every parameter.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not
    dominated by its random start. Buffers are copied as they are.

    Args:
        model: whose parameters to follow.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            checks.fail("decay", "a number in [0, 1)", decay)
        self.decay, self.updates = decay, 0
        self._live = _tensors(model)
        self._average = [value.detach().clone() for value in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average, live = self._floating(self._average), self._floating(self._live)
        torch._foreach_lerp_(average, live, 1 - decay)
        for mine, theirs in zip(self._average, self._live, strict=True):
            if not mine.is_floating_point():
                mine.copy_(theirs)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights; afterwards its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, theirs in zip(self._average, self._live, strict=True):
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)

    @staticmethod
    def _floating(values: list[Tensor]) -> list[Tensor]:
        return [value for value in values if value.is_floating_point()]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
