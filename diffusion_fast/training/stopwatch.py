"""How much of the time goes into waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Adds up the time inside :meth:`waiting` blocks."""

    def __init__(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def share(self) -> float:
        """The share of the time that was waited since this was asked last, in [0, 1]."""
        now = time.perf_counter()
        share = self._waited / max(now - self._start, 1e-9)
        self._start, self._waited = now, 0.0
        return share
