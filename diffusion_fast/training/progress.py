"""How far training is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from .trainer import Progress

EVERY = 10.0  # seconds between two lines


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
            recent = progress.losses[-50:]
            text = (
                f"{progress.step}/{steps}  loss {sum(recent) / len(recent):.4f} "
                f" {rate * batch_size:.0f} images/s, waiting for data {progress.waiting:.0%} "
                f" {left // 60}:{left % 60:02d} left"
            )
            bar.update(task, completed=progress.step, text=text)
            first = last == start
            if not console.is_terminal and (first or now - last >= EVERY or progress.step == steps):
                last = now
                console.print(f"training {text}", soft_wrap=True, highlight=False)

        yield on_read
