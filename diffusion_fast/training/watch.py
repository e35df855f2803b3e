"""Watching a run: where it stands, how it is shown, time lost to data, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType

EVERY = 10.0  # seconds between two lines


@dataclass
class Progress:
    """Where a run stands, as handed to ``on_read``.

    Attributes:
        step, steps: done, and of the whole run.
        loss: the step's loss.
        losses: the loss of every step so far.
        validation_loss: where it was measured at this step, else None.
        waiting: share of the time since the last such report that went into waiting for data.
    """

    step: int
    steps: int
    loss: float
    losses: list[float] = field(repr=False)
    validation_loss: float | None = None
    waiting: float = 0.0


OnRead = Callable[[Progress], object]


@contextlib.contextmanager
def show_progress(
    steps: int, batch_size: int, done: int = 0
) -> Iterator[Callable[[Progress], None]]:
    """Show loss, speed, wait for data and time left on standard error.

    Args:
        steps: number of steps of the run.
        batch_size: images per step, for the rate.
        done: number of steps of the run that were done before.

    Yields:
        A function for the ``on_read`` of :meth:`Trainer.fit`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[text]}"))
    start = last = time.perf_counter()
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=steps, completed=done, text=f"{done}/{steps}")

        def on_read(progress: Progress) -> None:
            nonlocal last
            now = time.perf_counter()
            rate = (progress.step - done) / max(now - start, 1e-9)
            left = round((steps - progress.step) / rate)
            recent, images = progress.losses[-50:], rate * batch_size
            text = (
                f"{progress.step}/{steps}  loss {sum(recent) / len(recent):.4f} "
                f" {images:.{0 if images >= 10 else 2}f} images/s, waiting for data"
                f" {progress.waiting:.0%} "
                f" {left // 60}:{left % 60:02d} left"
            )
            bar.update(task, completed=progress.step, text=text)
            first = last == start
            if not console.is_terminal and (first or now - last >= EVERY or progress.step == steps):
                last = now
                console.print(f"training {text}", soft_wrap=True, highlight=False)

        yield on_read


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


class Interruption:
    """Inside the block, the first Ctrl-C only sets ``asked``; a second one stops at once.

    Args:
        active: False leaves Ctrl-C as it is. Python hands signals to its main thread alone: in
            another one this is never active.
    """

    def __init__(self, active: bool = True) -> None:
        self.asked = False
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Interruption:
        if self._active:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
