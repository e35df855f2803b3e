"""The result of a request to come: a future with its progress."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..engine.slots import Seat
from .request import Request
from .result import Result


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        state: ``"queued"``, ``"running"``, ``"decoding"`` or ``"done"`` (also failed, cancelled).
        step: how many steps are done.
        steps: how many there are.
    """

    state: str
    step: int
    steps: int

    @property
    def part(self) -> float:
        """From 0 to 1."""
        return 1.0 if self.state == "done" else self.step / self.steps


class Pending(Future[Result]):
    """The result of a request to come: a :class:`concurrent.futures.Future` with its progress.

    ``cancel()`` works at any time before the result is there; a request that runs leaves its batch
    before the next step.

    Attributes:
        submitted: when it was asked for, by the monotonic clock.
        started: when it joined a batch, on the same clock; None before that.
        ended: when it was done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None

    @property
    def progress(self) -> Progress:
        """How far it is."""
        raise NotImplementedError

    def preview(self) -> Any:
        """The image that the last step predicts, noise left out: a PIL image, as it was when it was
        last drawn; None before that.

        Asking makes it be drawn anew, behind the next step, at most once a step.
        """
        raise NotImplementedError


class InBatch(Pending):
    """One that a batcher of this process draws, which writes how far it is."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request
        self._seat: Seat | None = None
        self._decoding = False
        self._preview: Any = None
        self._preview_row = 0
        self._wants_preview = False

    @property
    def progress(self) -> Progress:
        seat, steps = self._seat, self._request.table.steps
        if self.done():
            return Progress("done", steps, steps)
        if self._decoding:
            return Progress("decoding", steps, steps)
        if seat is None:
            return Progress("queued", 0, steps)
        return Progress("running", seat.step, steps)

    def preview(self) -> Any:
        self._wants_preview = not self.done()
        return self._preview
