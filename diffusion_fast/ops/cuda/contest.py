"""Which way of an op is the fastest on a GPU: measured once for each shape, and kept on disk."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..dispatch.measured import shape_of
from . import build

AGREE = 2.0**-5  # of the largest result: a few roundings of bfloat16, on either side


class Contest:
    """The ways to compute an op on a GPU.

    Args:
        op: the op's name.
        ways: functions of the op's arguments; the first of several results counts. One that raises
            RuntimeError for a call (there is no such kernel on this GPU, or not for this shape) has
            no part in it, nor has one whose result is another than the first one's. The first one
            can do all calls that are asked about; it is taken where nothing was measured.
    """

    def __init__(self, op: str, ways: Mapping[str, Callable[..., Any]]) -> None:
        self.op, self.ways = op, ways
        self.first = next(iter(ways))
        self._answers: dict[tuple[Any, ...], str] = {}

    def known(self, args: tuple[Any, ...]) -> str | None:
        """What was found for calls like this one, here or in an earlier process; None: nothing."""
        key = self._key(args)
        if key not in self._answers and _has_triton():
            from ...kernels import tuning  # imports triton

            found = tuning.known(self.op, key, args[0].device)
            names = {repr(name): name for name in self.ways}
            if found in names:
                self._answers[key] = names[found]
        return self._answers.get(key)

    def choose(self, args: tuple[Any, ...]) -> str:
        """The fastest way to this call, measured if it isn't known.

        Nothing is measured while a graph is being captured, nor without triton, whose package
        measures; then it is the first one.
        """
        found = self.known(args)
        if found is not None:
            return found
        if not _has_triton() or torch.cuda.is_current_stream_capturing():
            return self.first
        from ...kernels import tuning

        def run(name: str) -> Any:
            with torch.no_grad():
                return self.ways[name](*args)

        key, names = self._key(args), self._able(run)
        self._answers[key] = best = tuning.choose(self.op, key, names, run, args[0].device)
        return best

    def _able(self, run: Callable[[str], Any]) -> list[str]:
        """The ways that compute what the first one does."""
        names, truth = [self.first], run(self.first)[0]
        for name in list(self.ways)[1:]:
            try:
                found = run(name)[0]
            except RuntimeError:
                continue
            difference = (found.float() - truth.float()).abs().max()
            if difference <= AGREE * truth.abs().max():  # false for NaN
                names.append(name)
            else:
                what = f"{self.op}: {name} differs from {self.first} by {difference.item():.3g}"
                warnings.warn(f"{what} and is not used for such calls", stacklevel=3)
        return names

    def forget(self) -> None:
        """Ask the disk again."""
        self._answers.clear()

    def _key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (build.version(), *map(shape_of, args))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
