"""Where captures lie, and what one that failed leaves behind."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from diffusion_fast.engine.graphs import capture


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """A CUDA graph, whose capture the driver may have ended by itself."""

    ended_by_driver = False
    error: Exception | None = None  # of instantiate

    def __init__(self, ended_by_driver: bool = False, keep_graph: bool = False) -> None:
        self.ended_by_driver = ended_by_driver

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._pool = pool

    def capture_end(self) -> None:
        if self.ended_by_driver:
            raise RuntimeError("operation failed due to a previous error during capture")

    def instantiate(self) -> None:
        if self.error is not None:
            raise self.error

    def pool(self) -> Any:
        return self._pool


@pytest.fixture
def capturer(monkeypatch: pytest.MonkeyPatch) -> capture.CudaCapturer:
    """Of a GPU that isn't there."""
    handles = itertools.count(1)
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 0,
        "graph_pool_handle": lambda: (0, next(handles)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return capture.CudaCapturer()


def test_graphs_share_a_pool_while_one_is_left(capturer: capture.CudaCapturer) -> None:
    """One that lost its last graph must not be used again; PyTorch would fail an assertion."""

    def captured(device: str = "cuda:0") -> capture.CudaGraph:
        return capturer.capture(torch.device(device), lambda: None, lambda: None)

    first, second = captured(), captured()
    assert first.pool == second.pool
    other = captured("cuda:1")
    assert other.pool != first.pool
    pool = first.pool
    del first
    assert captured().pool == pool
    del second
    third = captured()
    assert third.pool not in (pool, other.pool)
    assert captured("cuda:1").pool == other.pool


@pytest.mark.parametrize("at", ["the work", "the end"])
def test_a_pool_with_a_broken_capture_is_used_no_more(
    monkeypatch: pytest.MonkeyPatch, capturer: capture.CudaCapturer, at: str
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("operation not permitted")

    device = torch.device("cuda")
    kept = capturer.capture(device, lambda: None, lambda: None)
    with monkeypatch.context() as broken:
        if at == "the end":
            broken.setattr(Graph, "capture_end", fails)
        work = fails if at == "the work" else lambda: None
        with pytest.raises(RuntimeError, match="not permitted"):
            capturer.capture(device, lambda: None, work)
    assert capturer.capture(device, lambda: None, lambda: None).pool != kept.pool


def test_the_driver_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, capturer: capture.CudaCapturer
) -> None:
    """It is told by the text alone; other errors stay as they are."""
    for text, kind in (
        ("CUDA error: out of memory", torch.OutOfMemoryError),
        ("CUDA error: an illegal memory access was encountered", torch.AcceleratorError),
    ):
        monkeypatch.setattr(Graph, "error", torch.AcceleratorError(text))
        with pytest.raises(kind, match=text):
            capturer.capture(torch.device("cuda"), lambda: None, lambda: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the private functions are called with."""
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(capture, "_broken", [])
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda *args, name=name: calls.append((name, args)), raising=False
        )
    return calls


@pytest.mark.parametrize("ended_by_driver", [False, True])
def test_the_allocator_does_not_go_on_capturing(
    calls: list[tuple[str, Any]], ended_by_driver: bool
) -> None:
    """PyTorch 2.11 ends its part only where the driver ends the capture without an error."""
    graph = Graph(ended_by_driver)
    capture._break_off(graph, (0, 7))
    args = (3, (0, 7))
    expected = [("_cuda_endAllocateToPool", args), ("_cuda_releasePool", args)]
    assert calls == (expected if ended_by_driver else [])
    assert capture._broken == ([graph] if ended_by_driver else [])


def test_an_allocator_that_was_told_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, Any]]
) -> None:
    """Released twice, a pool would end the process."""

    def nothing_to_end(*args: Any) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", nothing_to_end)
    capture._break_off(Graph(ended_by_driver=True), (0, 7))
    assert calls == capture._broken == []


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_releasePool"])
def test_without_the_private_functions(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, Any]], name: str
) -> None:
    monkeypatch.delattr(torch._C, name)
    capture._break_off(Graph(ended_by_driver=True), (0, 7))
    assert calls == []
