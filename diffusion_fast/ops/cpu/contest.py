"""Which way of an op is the fastest on this CPU: measured once, and kept on disk.

A contest has a few kinds of calls, and one made-up call for each. There all ways take turns, and
the least time of each counts. An engine measures before its first step (:func:`prepare`), a
fraction of a second once for a machine, its number of threads and these versions; no op ever does.
A process that finds results on disk uses them from its first call on; without any, the order of
:data:`~..dispatch.backend.BACKENDS` decides.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...hardware import processor
from ...kernels.measurements import adopt, file_of, lookup, remember, results
from ..dispatch import Op
from ..dispatch.backend import requested
from . import library

ROUNDS = 9
GAIN = 0.95  # a way that is not first must take at most so much of the first one's time

Kind = tuple[object, ...]

_contests: list[Contest] = []


class Contest:
    """The ways to compute an op on a CPU.

    Args:
        op: the op whose backends they are.
        kinds: a made-up call for each kind: the op's arguments.
        kind_of: the kind of a call, or None for one that no contest is about.
        default: the way to a kind until it is measured; None: the first that can.
    """

    def __init__(
        self,
        op: Op,
        kinds: Mapping[Kind, Callable[[], tuple[Any, ...]]],
        kind_of: Callable[..., Kind | None],
        default: Callable[[Kind], str | None],
    ) -> None:
        self.op, self.kinds, self.kind_of, self.default = op, kinds, kind_of, default
        self._keys = {kind: f"{op.name} {kind}" for kind in kinds}
        _contests.append(self)

    def slower(self, name: str) -> Callable[..., list[str]]:
        """A function that says why a backend is not the way to a call; nothing where it is."""

        def why(*args: Any) -> list[str]:
            kind = self.kind_of(*args)
            if kind is None or requested(self.op.name) != "auto" or library.machine():
                return []
            best = lookup(_file(), self._keys[kind])
            if best is None:
                default = self.default(kind)
                return [] if default in (None, name) else [f"{default} is taken until measured"]
            return [] if best == name else [f"{best} was measured faster for such calls here"]

        return why

    def measure(self) -> None:
        """Take the times that are missing, and decide about this op's calls anew."""
        file = _file()
        missing = [kind for kind in self.kinds if lookup(file, self._keys[kind]) is None]
        for kind in missing:
            remember(file, self._keys[kind], self._fastest(self.kinds[kind]()))
        if missing:
            self.op.forget()

    def _fastest(self, args: tuple[Any, ...]) -> str:
        ways = {}
        for backend in self.op.backends:
            why = backend.machine() if backend.machine is not None else []
            if not why and backend.supports is not None:
                why = backend.supports(*args)
            if not why and backend.name != "reference":
                ways[backend.name] = backend.run
        seconds = dict.fromkeys(ways, float("inf"))
        with torch.no_grad():
            for _ in range(ROUNDS):
                for name, run in ways.items():
                    start = time.perf_counter()
                    run(*args)
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
        first = next(iter(ways))
        best = min(seconds, key=seconds.__getitem__)
        return best if seconds[best] < GAIN * seconds[first] else first


def prepare() -> None:
    """Have the kernels compiled, and take all times that are missing."""
    if not library.settle():
        for contest in _contests:
            contest.measure()


def taken() -> dict[str, Any]:
    """The results that decide in this process, as JSON can hold them; empty without kernels."""
    if library.machine():
        return {}
    return {"machine": _file().name, "ways": results(_file())}


def take(saved: Mapping[str, Any]) -> None:
    """Go on with what :func:`taken` gave in another process: sums are rounded as they were there.

    Results of another machine, other versions or another number of threads decide nothing here.
    """
    if not library.machine() and saved.get("machine") == _file().name:
        adopt(_file(), saved["ways"])
        for contest in _contests:
            contest.op.forget()


def _file() -> Path:
    machine = f"{processor()['processor']}-{_features()}-{torch.get_num_threads()}threads"
    return file_of(machine, _version())


@functools.cache
def _version() -> str:
    return f"torch{torch.__version__}-{library.key()}"


@functools.cache
def _features() -> str:
    """The CPU's features: of the same model, machines may have some switched off."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return hashlib.sha256(f"{library.level()} {flags}".encode()).hexdigest()[:8]
