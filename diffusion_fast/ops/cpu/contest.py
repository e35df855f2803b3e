"""Which way of an op is the fastest on this CPU: measured once, and kept on disk.

A contest is about kinds of calls, and makes up a call of each. There all ways take turns, and the
least time of each counts. An engine measures before its first step (:func:`prepare`), once for a
machine, its number of threads and these versions: some kinds always, and those of the calls of its
network (:class:`Work`). No op ever measures. A process that finds results on disk uses them from
its first call on; without any, the order of :data:`~..dispatch.backend.BACKENDS` decides.

Where other programs have the cores, times say little about the ways: a parallel loop waits for the
last of its threads. Such times count as long as there are no better ones: the next process that
finds the cores free measures again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import cores
from ...hardware import cpu_flags, processor
from ...kernels.measurements import adopt, file_of, remember, results
from ..dispatch import Op
from ..dispatch.backend import BACKENDS, requested
from . import library, threads

ROUNDS, LEAST_ROUNDS = 9, 2
ENOUGH = 0.1  # seconds for a kind, after which the least number of rounds will do
PATIENCE = 0.2  # seconds for a kind, after which times beside other programs will do
BUSY = 0.25  # share of its time for which a call may wait for cores
LOST = 2.0  # a way that takes so much longer than the best one has no further round
DOUBT = "?"  # ends a result on disk whose times are such that waited for cores
GAIN = 0.95  # a way that is not first must take at most so much of the first one's time
MANY = 8  # kinds from which a line says that they are measured
FEW = 2**28  # multiply-adds of a step, about a millisecond, below which nothing is measured

Kind = tuple[object, ...]
Ways = Mapping[str, Callable[..., Any]]
Calls = Iterable[tuple[str, tuple[Any, ...]]]  # an op's name and its arguments

_contests: list[Contest] = []
_decides: Path | None = None  # the file whose results do, since an engine asked for it


class Time(NamedTuple):
    """How long a call took; one that had the cores is less than all that had not.

    Attributes:
        disturbed: whether it waited for cores, which other programs had.
        seconds: the time.
    """

    disturbed: bool
    seconds: float


NEVER = Time(True, float("inf"))


def _timed(run: Callable[[], object]) -> Time:
    waited, start = cores.waited(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return Time(cores.waited() - waited > BUSY * seconds, seconds)


def least_times(ways: Mapping[str, Callable[[], object]]) -> dict[str, Time]:
    """The least time of each way; they take turns."""
    least, began = dict.fromkeys(ways, NEVER), time.perf_counter()
    for turn in itertools.count():
        passed = time.perf_counter() - began
        enough = turn >= ROUNDS or (turn >= LEAST_ROUNDS and passed > ENOUGH)
        if enough and (passed > PATIENCE or not max(least.values()).disturbed):
            break
        limit = LOST * min(one.seconds for one in least.values())
        for name, run in ways.items():
            if least[name].disturbed or least[name].seconds <= limit:
                least[name] = min(least[name], _timed(run))
    return least


@dataclass(frozen=True)
class Work:
    """The op calls of a network's step.

    Attributes:
        name: all that decides them, by which results on disk are known to be complete; empty where
            there is no such name.
        calls: finds them: names of ops, and arguments of which no data is read. That is as much
            Python as a step.
        most: multiply-adds that they have at most, as far as that is known without finding them.
    """

    name: str = ""
    calls: Callable[[], Calls] = tuple
    most: float = math.inf

    @property
    def tiny(self) -> bool:
        """Whether a step takes so little that nothing is measured for it."""
        return self.most < FEW

    def key(self, of: str) -> str:
        """The name of a result about it."""
        return f"{of} {hashlib.sha256(self.name.encode()).hexdigest()[:16]}"


NO_WORK = Work()


class Contest:
    """The ways to compute an op on a CPU.

    Args:
        op: the op.
        kind_of: the kind of a call, from the op's arguments; None for one that it isn't about.
        example: a made-up call of a kind: the op's arguments.
        ways: what can compute a call, by name, the preferred first; None: the op's backends.
        names: of all ways.
        always: the kinds to measure whatever a network calls.
    """

    def __init__(
        self,
        op: Op,
        kind_of: Callable[..., Kind | None],
        example: Callable[..., tuple[Any, ...]],
        *,
        ways: Callable[..., Ways] | None = None,
        names: Sequence[str] = BACKENDS,
        always: Iterable[Kind] = (),
    ) -> None:
        self.op, self.kind_of, self.example = op, kind_of, example
        self._decided = [op]  # those whose calls it decides about
        self.ways, self.names, self.always = ways or self._backends, names, tuple(always)
        self._known = op.kept(lambda: known())  # looked for in the module, where tests change it
        _contests.append(self)

    def key(self, kind: Kind) -> str:
        """The name of a kind's result."""
        return f"{self.op.name} {kind}"

    def order(self, kind: Kind | None) -> list[str]:
        """The names of the ways to a kind, the fastest first; empty where nothing is known."""
        if kind is None or not (found := self._known()):
            return []
        order = found.get(self.key(kind), "").split()
        if order[-1:] == [DOUBT]:
            order.pop()
        return order if all(name in self.names for name in order) else []

    def doubtful(self, kind: Kind) -> bool:
        """Whether a kind's result is one of another process, which did not have the cores."""
        return self._known().get(self.key(kind), "").endswith(DOUBT)

    def slower(
        self,
        name: str,
        among: Sequence[str] | None = None,
        otherwise: str | None = None,
        kind_of: Callable[..., Kind | None] | None = None,
    ) -> Callable[..., list[str]]:
        """A function that says why a way is not the one to a call; nothing where it is.

        Args:
            name: the way's.
            among: the ways that are open to such calls; None for all.
            otherwise: the way to calls about which nothing is known; None for ``name``.
            kind_of: the kind of a call, where another op than the contest's asks.
        """
        kind_of = kind_of or self.kind_of

        def why(*args: Any) -> list[str]:
            if requested(self.op.name) != "auto":
                return []
            order = self.order(kind_of(*args))
            best = next((way for way in order if among is None or way in among), None)
            if best is None and otherwise not in (None, name):
                return ["nothing was measured about such calls here"]
            lost = best not in (None, name)
            return [f"{best} was measured faster for such calls here"] if lost else []

        return why

    def decides(self, op: Op) -> None:
        """Say that another op asks :meth:`slower` too."""
        self._decided.append(op)

    def forget(self) -> None:
        """Have all calls decided anew."""
        for op in self._decided:
            op.forget()

    def wanted(self, calls: Iterable[tuple[Any, ...]]) -> list[Kind]:
        """The kinds that are to be known for calls of the op, given by its arguments."""
        return list(dict.fromkeys((*self.always, *self.kinds_of(calls))))

    def kinds_of(self, calls: Iterable[tuple[Any, ...]]) -> list[Kind]:
        """The kinds of calls, without those that it isn't about."""
        return [kind for args in calls if (kind := self.kind_of(*args)) is not None]

    def measure(self, kind: Kind) -> bool:
        """Take the times of a kind, and decide about this op's calls anew.

        Returns:
            Whether the ways had the cores; otherwise another process is to measure again.
        """
        order, sure = self._measured(kind)
        decide(self.key(kind), " ".join(order), sure)
        self.forget()
        return sure

    def _measured(self, kind: Kind) -> tuple[list[str], bool]:
        """The ways to a kind by the time they take, where all but the first have a handicap.

        And whether those are times for which they had the cores.
        """
        args = self.example(*kind)
        ways = self.ways(*args)
        times = least_times({name: functools.partial(run, *args) for name, run in ways.items()})
        seconds = {name: time.seconds for name, time in times.items()}
        seconds[next(iter(ways))] *= GAIN
        return sorted(ways, key=seconds.__getitem__), not max(times.values()).disturbed

    def _backends(self, *args: Any) -> Ways:
        ways = {}
        for backend in self.op.backends:
            why = backend.machine() if backend.machine is not None else []
            if not why and backend.supports is not None:
                why = backend.supports(*args)
            if not why and backend.name != "reference":
                ways[backend.name] = backend.run
        return ways


def packed_call(
    run: Callable[..., torch.Tensor], packed: Sequence[torch.Tensor] | None
) -> Callable[..., torch.Tensor]:
    """A way that reads a packed weight, which is the last of an op's arguments."""
    return lambda *args: run(*args[:-1], packed or ())


@torch.no_grad()
def prepare(work: Work = NO_WORK) -> None:
    """Have the kernels compiled, and take all times that are missing for a network, unless it is
    tiny.

    Where the number of threads is another than the last time, or the cache folder, other results
    decide from now on.
    """
    global _decides
    if library.settle():
        return
    if _decides != _file():
        _decides = _file()
        for contest in _contests:
            contest.forget()
    if work.tiny or (work.name and _complete(known().get(work.key("measured"), ""))):
        return
    calls = list(work.calls())
    wanted = [(contest, contest.wanted(_of(contest, calls))) for contest in _contests]
    pairs = [(one, kind) for one, kinds in wanted for kind in kinds]
    missing = [(one, kind) for one, kind in pairs if not one.order(kind)]
    doubtful = [(one, kind) for one, kind in pairs if one.doubtful(kind)]
    count = sum(not one.always for one, _ in missing)
    if count >= MANY:
        told = f"diffusion_fast: measuring the ways to {count} products on this CPU, once"
        print(told, file=sys.stderr, flush=True)
    with threads.using(threads.most()):
        lost = sum(not one.measure(kind) for one, kind in missing)
        _ = not lost and all(one.measure(kind) for one, kind in doubtful)  # until one is in doubt
    for one, kind in doubtful:
        known()[one.key(kind)] = " ".join(one.order(kind))  # it stays so in this process
    if lost >= MANY:
        told = f"diffusion_fast: {lost} are measured again next time: other programs had the cores"
        print(told, file=sys.stderr, flush=True)
    if work.name:
        remember(_file(), work.key("measured"), "\n".join(one.key(kind) for one, kind in pairs))


def decide(key: str, result: str, sure: bool) -> None:
    """Have a result decide in this process, and in others: where it is not sure, for now."""
    remember(_file(), key, result if sure else f"{result} {DOUBT}")
    known()[key] = result


def _complete(keys: str) -> bool:
    """Whether all results of these names are there, a line for each; not where there is none."""
    found, names = known(), {contest.op.name: set(contest.names) for contest in _contests}
    parts = [(found.get(key, ""), key.partition(" ")[0]) for key in keys.splitlines()]
    whole = (order and names.get(op, set()).issuperset(order.split()) for order, op in parts)
    return bool(parts) and all(whole)


@torch.no_grad()
def told(work: Work) -> str:
    """How many of a network's products go which way, where that was measured."""
    calls, parts = list(work.calls()), []
    for contest in _contests:
        orders = [contest.order(kind) for kind in contest.kinds_of(_of(contest, calls))]
        counts = Counter(order[0] for order in orders if order)
        parts += [f"{contest.op.name} {name} {count}" for name, count in counts.most_common()]
    return ", ".join(parts) or "nothing was measured"


def _of(contest: Contest, calls: Calls) -> list[tuple[Any, ...]]:
    return [args for name, args in calls if name == contest.op.name]


def taken() -> dict[str, Any]:
    """The results that decide in this process, as JSON can hold them; empty without kernels."""
    if library.machine():
        return {}
    # Those in doubt have decided here, so none of them is to be found anew where they are taken.
    ways = {key: way.removesuffix(f" {DOUBT}") for key, way in results(_file()).items()}
    return {"machine": _file().name, "ways": ways}


def take(saved: Mapping[str, Any]) -> bool:
    """Go on with what :func:`taken` gave in another process: sums are rounded as they were there.

    Results of another machine, other versions or another number of threads decide nothing here.

    Returns:
        Whether they are of this machine, these versions and this number of threads.
    """
    if library.machine() or saved.get("machine") != _file().name:
        return False
    adopt(_file(), saved["ways"])
    for contest in _contests:
        contest.forget()
    return True


def known() -> dict[str, str]:
    """The results that decide here and now; none without kernels."""
    return {} if library.machine() else results(_file())


def _file() -> Path:
    return file_of(f"{machine()}-{threads.most()}threads", _version())


@functools.cache
def _version() -> str:
    return f"torch{torch.__version__}-{library.key()}"


@functools.cache
def machine() -> str:
    """The CPU's model, and its features: machines of one model may have some switched off."""
    features = f"{library.level()} {' '.join(sorted(cpu_flags()))}"
    return f"{processor()['processor']}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
