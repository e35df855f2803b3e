"""Where a step of the engine goes on a CPU: calls, time and rate of each of the project's ops."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from diffusion_fast.engine.rewrites import recorded
from diffusion_fast.engine.rewrites.cost import flops
from diffusion_fast.ops.dispatch import Op

from ..lib.environment import GPU
from ..lib.timing import percentiles
from .networks import Networks
from .variants import engine_loop

STEP, OTHER = "whole step", "other"  # rows beside those of the ops
TRIES = 3  # of a call alone
Around = Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]  # name, arguments, the call


@dataclass
class Tally:
    """What the calls of an op add up to; ``alone`` are the seconds that they would take alone."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    alone: float = 0.0


def measure_ops(
    networks: Networks, images: int, steps: int, budget: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for the step and for each op, what takes the longest first, per step of a loop.

    ``other`` is what no op does: Python, and PyTorch's own operators. The rates of products,
    convolutions and attention stand beside those of the same calls alone: the least time of a
    kind's first call, repeated at once, when all that it reads is at hand. A step is walked through
    with its Python here, where a small network's is recorded otherwise.
    """
    if GPU:
        return [{"variant": STEP, "reason": "for CPUs alone"}]
    with mock.patch.object(recorded, "PLAIN", -1):
        run = engine_loop(networks, networks.inputs(images), steps, graph="off")[1]
        run()  # measures what is measured once for a machine, and packs weights
        alone: dict[Any, float] = {}
        with ops_called(lambda *call: _alone(alone, *call)):
            run()
        walls: list[float] = []
        found: list[dict[str, Tally]] = []
        start = time.perf_counter()
        while len(walls) < rounds or time.perf_counter() - start < budget:
            tallies: dict[str, Tally] = defaultdict(Tally)
            begin = time.perf_counter()
            with ops_called(lambda *call, into=tallies: _timed(into, alone, *call)):
                run()
            walls.append(time.perf_counter() - begin)
            found.append(tallies)
    pairs = zip(walls, found, strict=True)
    rest = [wall - sum(one.seconds for one in of.values()) for wall, of in pairs]
    rows = [_row(STEP, walls, walls, steps), _row(OTHER, rest, walls, steps)]
    for name, tally in found[-1].items():
        row = _row(name, [of[name].seconds for of in found], walls, steps)
        row["calls"] = tally.calls / steps
        if tally.flops:
            row["gflops_per_s"] = tally.flops / steps / row["p50_s"] / 1e9
            row["alone_gflops_per_s"] = tally.flops / tally.alone / 1e9
        rows.append(row)
    return sorted(rows, key=lambda row: row["p50_s"], reverse=True)


def _row(name: str, seconds: list[float], walls: list[float], steps: int) -> dict[str, Any]:
    each = percentiles([one / steps for one in seconds])
    shares = percentiles([one / wall for one, wall in zip(seconds, walls, strict=True)])
    speed = {f"{p}_s": value for p, value in each.items()}
    return {"variant": name, **speed, "samples": len(seconds), "share": shares["p50"]}


@contextlib.contextmanager
def ops_called(around: Around) -> Iterator[None]:
    """Has every call of an op, but for those that other ops make, go through a function."""
    plain, inside = Op.__call__, False

    def call(op: Op, *args: Any, **options: Any) -> Any:
        nonlocal inside
        if inside:
            return plain(op, *args, **options)
        inside = True
        try:
            return around(op.name, args, lambda: plain(op, *args, **options))
        finally:
            inside = False

    with mock.patch.object(Op, "__call__", call):
        yield


def _kind(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What calls that take the same time agree in: shapes and plain numbers."""
    shapes = (one.shape if isinstance(one, Tensor) else one for one in args)
    return name, *(one for one in shapes if not isinstance(one, list))


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _alone(least: dict[Any, float], name: str, args: tuple[Any, ...], call: Any) -> Any:
    """Note the least time of a kind that does products; what it returns is new at each call."""
    result, kind = call(), _kind(name, args)
    if flops(name, args, result) and kind not in least:
        least[kind] = min(_seconds(call)[0] for _ in range(TRIES))
    return result


def _timed(
    into: dict[str, Tally], least: dict[Any, float], name: str, args: tuple[Any, ...], call: Any
) -> Any:
    seconds, result = _seconds(call)
    tally = into[name]
    tally.calls += 1
    tally.seconds += seconds
    tally.flops += flops(name, args, result)
    tally.alone += least.get(_kind(name, args), 0.0)
    return result
