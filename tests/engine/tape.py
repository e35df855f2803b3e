"""Graphs without a GPU: operators recorded with the very tensors that they read and wrote.

A replay calls them again on those tensors. So it sees what a CUDA graph sees: the addresses of the
time of capture, no Python, no other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffusion_fast.engine import capture, graph


class TapeGraph:
    def __init__(self, calls: list[tuple[Any, ...]], bytes: int) -> None:
        self.calls, self.bytes = calls, bytes
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
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        while True:
            self.step.replay()
            if self.counter.item() >= self.count.item():
                return


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
    """Records on the CPU, and does what a test asks for: fail, take memory, know no loops."""

    def __init__(self) -> None:
        self.graphs: list[TapeGraph | Loop] = []
        self.failures: list[Exception] = []
        self.captures = 0
        self.bytes = 100
        self.why_no_loop: str | None = None
        self.loop_error: str | None = None

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def capture(
        self, device: torch.device, warm_up: Callable[[], None], work: Callable[[], None]
    ) -> TapeGraph:
        if self.failures:
            raise self.failures.pop(0)
        capture.settle(warm_up)
        with Recorder() as recorder:
            work()
        self.captures += 1
        self.graphs.append(TapeGraph(recorder.calls, self.bytes))
        return self.graphs[-1]

    def no_while_loop(self) -> str | None:
        return self.why_no_loop

    def repeat(self, step: TapeGraph, counter: Tensor, count: Tensor) -> Loop:
        if self.loop_error:
            raise RuntimeError(self.loop_error)
        self.graphs.append(Loop(step, counter, count))
        return self.graphs[-1]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> TapeCapturer:
    """Engines made in the test capture on the CPU."""
    capturer = TapeCapturer()
    monkeypatch.setattr(graph, "CudaCapturer", lambda: capturer)
    return capturer
