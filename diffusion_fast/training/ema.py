"""An exponential moving average of a model's weights: what is sampled from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import checks
from .sharding import local


class EMA:
    """Keeps ``average <- decay * average + (1 - decay) * weight`` for parameters and buffers.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not
    dominated by its random start. Integer buffers are copied as they are. Of a sharded model each
    process averages its own part.

    Args:
        model: whose parameters to follow.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            checks.fail("decay", "a number in [0, 1)", decay)
        self.decay, self.updates = decay, 0
        self._live = named_tensors(model)
        self._average = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average, live = self._floating(self._average), self._floating(self._live)
        torch._foreach_lerp_(average, live, 1 - decay)
        for mine, theirs in self._pairs():
            if not mine.is_floating_point():
                mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of parameters and buffers; ``updates`` is apart."""
        return self._average

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
        for mine, theirs in self._pairs():
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(self._average.values(), self._live.values(), strict=True)
        return ((local(mine), local(theirs)) for mine, theirs in pairs)

    @staticmethod
    def _floating(values: dict[str, Tensor]) -> list[Tensor]:
        return [local(value) for value in values.values() if value.is_floating_point()]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, also those that a state_dict leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
