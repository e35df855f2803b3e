"""Which row of its table the sampling loop is at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Clock:
    """Counts rows: on the host, or on the device where a captured graph must count by itself.

    Attributes:
        row: the row, while the host counts.
        counter: int64 [1], the row, while the device counts.
        counts_on_device: which of them counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.row = 0
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.counts_on_device = False

    @property
    def step(self) -> int | Tensor:
        """The row as :func:`diffusion_fast.ops.sampler_step` takes it."""
        return self.counter if self.counts_on_device else self.row

    def pick(self, table: Tensor) -> Tensor:
        """The row of a table [R, ...]: a view, or copied by the device's counter."""
        return table.index_select(0, self.counter)[0] if self.counts_on_device else table[self.row]

    def start(self) -> None:
        self.row = 0
        self.counter.zero_()

    def advance(self) -> None:
        if self.counts_on_device:
            self.counter.add_(1)
        else:
            self.row += 1

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Count on the device inside the ``with`` block: what is captured there serves any row."""
        self.counts_on_device = True
        try:
            yield
        finally:
            self.counts_on_device = False
