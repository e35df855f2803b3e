"""An exponential moving average of a model's weights: what is sampled from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import checks
from .distributed import fill_local, local


class EMA:
    """Keeps ``average <- decay * average + (1 - decay) * weight`` for parameters and buffers.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not
    dominated by its random start. Averages of half precision are kept in float32, where a small
    step is not rounded away. Integers are copied, and so are elements that are not finite, such as
    those of a mask. Of a sharded model each process averages its own part.

    Args:
        model: network whose parameters to follow.
        decay: share of the average that is kept at each step, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            checks.fail("decay", "a number in [0, 1)", decay)
        self.decay, self.updates = decay, 0
        self._live = named_tensors(model)
        self._average = {n: v.detach().to(_wide(v), copy=True) for n, v in self._live.items()}
        self._trained = {  # averaged in one launch
            name
            for name, value in self._live.items()
            if value.requires_grad and value.dtype == _wide(value) and is_finite(value)
        }

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        trained: tuple[list[Tensor], list[Tensor]] = [], []
        for name, live in self._live.items():
            mine, theirs = _real(local(self._average[name])), _real(local(live))
            if not mine.is_floating_point():
                mine.copy_(theirs)
            elif name in self._trained:
                trained[0].append(mine)
                trained[1].append(theirs)
            else:
                theirs = theirs.to(mine.dtype)
                moved = mine.lerp(theirs, weight)
                mine.copy_(torch.where(moved.isfinite(), moved, theirs))
        if self._trained:
            torch._foreach_lerp_(*trained, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of parameters and buffers; ``updates`` is apart."""
        return self._average

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights; afterwards its own again."""
        own = {name: local(value).detach().clone() for name, value in self._live.items()}
        try:
            self._write({name: local(value) for name, value in self._average.items()})
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            fill_local(local(self._live[name]), value)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, also those that a state_dict leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def is_finite(value: Tensor) -> bool:
    """Whether all numbers that this process has of a tensor are finite."""
    return bool(local(value).isfinite().all())


def _wide(value: Tensor) -> torch.dtype:
    """The dtype that an average of these numbers is kept in."""
    if value.is_floating_point() and value.itemsize < 4:
        return torch.float32
    return torch.complex64 if value.dtype == torch.complex32 else value.dtype


def _real(value: Tensor) -> Tensor:
    """Complex numbers as pairs, in the same memory."""
    return torch.view_as_real(value) if value.is_complex() else value
