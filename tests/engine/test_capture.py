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


class Workspace:
    """cuBLAS's of a stream as PyTorch keeps it: from the first product until all are freed.

    Attributes:
        pool: where memory comes from now; None outside of a capture.
        kept: the pool that the workspace lies in; empty where there is no workspace.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.kept: list[Any] = []

    def product(self) -> Any:
        """The pool of the workspace that a product uses."""
        self.kept = self.kept or [self.pool]
        return self.kept[0]

    def clear(self) -> None:
        assert self.pool is None, "in the middle of a capture"
        self.kept = []


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_workspaces_of_a_graph_are_its_own(
    monkeypatch: pytest.MonkeyPatch, capturer: capture.CudaCapturer, broken: bool
) -> None:
    """Others free those outside of the pool, which the graph would go on to use."""
    workspace = Workspace()
    used: list[Any] = []

    def begin(graph: Graph, pool: Any, capture_error_mode: str) -> None:
        graph._pool = workspace.pool = pool

    def end(graph: Graph) -> None:
        workspace.pool = None

    def work() -> None:
        used.append(workspace.product())
        if broken:
            raise RuntimeError("operation not permitted")

    monkeypatch.setattr(Graph, "capture_begin", begin)
    monkeypatch.setattr(Graph, "capture_end", end)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", workspace.clear, raising=False)
    graphs = []
    for _ in range(2):
        with pytest.raises(RuntimeError) if broken else contextlib.nullcontext():
            graphs.append(capturer.capture(torch.device("cuda"), workspace.product, work))
        assert workspace.kept == []  # or it would keep the pool, when all of its graphs are gone
    assert None not in used
    if not broken:
        assert used == [graph.pool for graph in graphs]


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
