"""Graphs without a GPU: operators recorded with the very tensors that they read and wrote.

A replay calls them again on those tensors. So it sees what a CUDA graph sees: the addresses of the
time of capture, no Python, no other weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import diffusion_fast as df
from diffusion_fast.engine.graphs import capture, policy


class TapeGraph:
    def __init__(self, calls: list[tuple[Any, ...]], bytes: int, pool: str = "a pool") -> None:
        self.calls, self.bytes, self.pool = calls, bytes, pool
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self.calls:
            now = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(recorded, now, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Loop:
    """A step until the counter reaches the count."""

    bytes = 0

    def __init__(self, step: TapeGraph, counter: Tensor, count: Tensor) -> None:
        self.step, self.counter, self.count = step, counter, count
        self.pool = step.pool
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        while True:
            self.step.replay()
            if self.counter.item() >= self.count.item():
                return


class Unrolled:
    """A step so many times."""

    bytes = 0

    def __init__(self, step: TapeGraph, times: int) -> None:
        self.step, self.times, self.pool = step, times, step.pool

    def replay(self) -> None:
        for _ in range(self.times):
            self.step.replay()


class Recorder(capture.NoRandomNumbers):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, pytree.tree_leaves(result)))
        return result


class TapeCapturer:
    """Records on the CPU, and does what a test asks for: fail, take memory, know no loops.

    Attributes:
        graphs: those that somebody has.
        bytes, pool: what a capture takes, and where.
        room: how much there is. As on a GPU, a pool keeps all until its last graph is gone.
    """

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[TapeGraph | Loop | Unrolled] = weakref.WeakSet()
        self.failures: list[Exception] = []
        self.captures = 0
        self.bytes, self.pool, self.room = 100, "a pool", 10_000
        self.taken: dict[str, int] = {}
        self.why_no_loop: str | None = None
        self.loop_error: Exception | None = None
        self.unroll_error: Exception | None = None

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def capture(
        self, device: torch.device, warm_up: Callable[[], None], work: Callable[[], None]
    ) -> TapeGraph:
        if self.failures:
            raise self.failures.pop(0)
        alive = {graph.pool for graph in self.graphs}
        self.taken = {pool: taken for pool, taken in self.taken.items() if pool in alive}
        if sum(self.taken.values()) + self.bytes > self.room:
            raise torch.OutOfMemoryError("no room")
        self.taken[self.pool] = self.taken.get(self.pool, 0) + self.bytes
        capture.settle(warm_up)
        with Recorder() as recorder:
            work()
        self.captures += 1
        return self._kept(TapeGraph(recorder.calls, self.bytes, self.pool))

    def _kept(self, graph: Any) -> Any:
        self.graphs.add(graph)
        return graph

    def no_while_loop(self) -> str | None:
        return self.why_no_loop

    def repeat(self, step: TapeGraph, counter: Tensor, count: Tensor) -> Loop:
        if self.loop_error:
            raise self.loop_error
        return self._kept(Loop(step, counter, count))

    def unroll(self, step: TapeGraph, times: int) -> Unrolled:
        if self.unroll_error:
            raise self.unroll_error
        return self._kept(Unrolled(step, times))


def captured(engine: df.Engine, name: str) -> list[Any]:
    """An engine's graphs of a name: ``"step"``, ``"loop"``, or ``"work"`` of what is prepared."""
    kinds = engine._graphs.cache._graphs.values()
    return [graphs[name][1] for graphs in kinds if name in graphs]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> TapeCapturer:
    """Engines made in the test capture on the CPU."""
    capturer = TapeCapturer()
    monkeypatch.setattr(policy, "CudaCapturer", lambda: capturer)
    return capturer
