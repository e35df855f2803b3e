"""How far a loop is: its steps, a progress bar, and the step where a model went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from ..samplers.table import StepTable


class Steps:
    """Which step each row belongs to: some samplers call the model twice in a step."""

    def __init__(self, table: StepTable) -> None:
        self._step: list[int] = table.step_of_row.tolist()
        self._t: list[float] = table.timesteps.tolist()

    def __len__(self) -> int:
        return self._step[-1] + 1

    def ends(self, row: int) -> bool:
        return row + 1 == len(self._step) or self._step[row + 1] != self._step[row]

    def of(self, row: int) -> tuple[int, float]:
        """The step, counted from 0, and its first timestep."""
        step = self._step[row]
        return step, self._t[self._step.index(step)]


def check_finite(peak: Tensor, steps: Steps) -> None:
    """The one host read of a run, after its last step."""
    finite = peak.isfinite()
    if not finite.all():
        step, t = steps.of(int((~finite).nonzero()[0]))
        raise FloatingPointError(
            f"model: expected finite outputs, got NaN or infinity first at step {step} (t = {t:g};"
            f" steps count from 0 to {len(steps) - 1})"
        )


def track(steps: Sequence[int] | range, label: str, enabled: bool) -> Iterator[int] | Iterable[int]:
    """``steps`` as they are, or with a progress bar on standard error."""
    if not enabled:
        return steps
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(steps, description=label, console=Console(stderr=True))
