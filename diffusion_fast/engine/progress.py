"""A progress bar for loops, imported only when one is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def track(steps: Sequence[int] | range, label: str, enabled: bool) -> Iterator[int] | Iterable[int]:
    """``steps`` as they are, or with a progress bar on standard error."""
    if not enabled:
        return steps
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(steps, description=label, console=Console(stderr=True))
