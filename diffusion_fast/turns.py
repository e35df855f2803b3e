"""Runs that take turns: one thread at a time, and no run inside another."""

from __future__ import annotations

import threading
from typing import Any


class Turns:
    """A lock, for ``with``, which refuses the thread that has it instead of letting it wait.

    It can be copied and pickled; the copy is free.

    Args:
        of: what has the runs, for the message.
    """

    def __init__(self, of: str) -> None:
        self._of, self._lock = of, threading.Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        if self._thread == threading.get_ident():
            raise RuntimeError(
                f"{self._of}: expected a callback, hook or model that leaves alone what is running"
                f" it, got a call that would wait for itself for ever; call it after the run, or"
                f" make another {self._of} for the callback"
            )
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._thread = None
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._of,)
