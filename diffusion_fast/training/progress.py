"""A training progress bar: step, loss, images per second, wait for data, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .trainer import Progress


@contextlib.contextmanager
def show_progress(
    steps: int, batch_size: int, done: int = 0
) -> Iterator[Callable[[Progress], None]]:
    """A bar on standard error, fed through the ``on_read`` of :meth:`Trainer.fit`.

    Args:
        steps: of the run.
        batch_size: images per step, for the rate.
        done: steps of the run that were done before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:.0f} images/s, waiting for data {task.fields[waiting]:.0%}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(
            "training", total=steps, completed=done, loss=float("nan"), rate=0.0, waiting=0.0
        )

        def on_read(progress: Progress) -> None:
            recent = progress.losses[-50:]
            elapsed = bar.tasks[0].elapsed or 1e-9
            bar.update(
                task,
                completed=progress.step,
                loss=sum(recent) / len(recent),
                rate=(progress.step - done) * batch_size / elapsed,
                waiting=progress.waiting,
            )

        yield on_read
