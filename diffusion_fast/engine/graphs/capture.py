"""CUDA graphs: capture, replay, and the loop on the device. Nothing else here knows CUDA."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .while_loop import UnrolledLoop, WhileLoop, no_while_loop


class Graph(Protocol):
    """Work that was captured: ``replay`` does it again, on the same tensors.

    Attributes:
        bytes: what its capture added to the memory of its pool.
        pool: where its tensors lie; the memory of a pool is freed with the last of its graphs.
    """

    bytes: int
    pool: Hashable

    def replay(self) -> None: ...


class Capturer(Protocol):
    """Captures graphs. The tests have one for the CPU, which records operators."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing on this device can be captured; None if it can."""
        ...

    def capture(
        self, device: torch.device, warm_up: Callable[[], None], work: Callable[[], None]
    ) -> Graph:
        """A graph of ``work``, after some calls of ``warm_up``; both change their tensors."""
        ...

    def no_while_loop(self) -> str | None:
        """Why the device can't repeat a step by itself; None if it can."""
        ...

    def repeat(self, step: Graph, counter: Tensor, count: Tensor) -> Graph:
        """A graph that does a step while counter < count, which the step must bring about.

        Raises:
            RuntimeError: the driver refuses.
        """
        ...

    def unroll(self, step: Graph, times: int) -> Graph:
        """A graph that does a step so many times.

        Raises:
            RuntimeError: the driver refuses, or nothing here can ask it.
        """
        ...


class CudaGraph:
    """A graph on a GPU, which keeps the captured nodes, so that they can be a loop's body."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device, bytes: int) -> None:
        self.graph, self.device, self.bytes = graph, device, bytes
        self.pool: Hashable = graph.pool()

    def replay(self) -> None:
        self.graph.replay()


class CudaCapturer:
    """Graphs of one engine. They share a pool of memory, because only one runs at a time."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def unavailable(self, device: torch.device) -> str | None:
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        return None if device.type == "cuda" else f"the model is on {device}"

    def capture(
        self, device: torch.device, warm_up: Callable[[], None], work: Callable[[], None]
    ) -> CudaGraph:
        """Captures on a stream of its own.

        Raises:
            torch.OutOfMemoryError: there is too little memory for the work or its graph.
            RuntimeError: the work draws random numbers, which a loop on the device would repeat, or
                does what no graph can hold, such as reading a tensor on the host.
        """
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(stream):
                    settle(warm_up)
                    torch.cuda.synchronize(device)
                    gc.collect()
                    torch.cuda.empty_cache()
                    return self._captured(device, work)
            except torch.AcceleratorError as error:
                if "out of memory" in str(error):  # the driver's own, such as for a graph's nodes
                    raise torch.OutOfMemoryError(str(error)) from error
                raise
            finally:  # the loop on the host, after a failure, writes to what a warm-up may yet read
                torch.cuda.current_stream(device).wait_stream(stream)

    def _captured(self, device: torch.device, work: Callable[[], None]) -> CudaGraph:
        before = torch.cuda.memory_reserved(device)
        pool = self._pools.get(device)
        if all(graph.pool() != pool for graph in self._alive):
            # The first one, because a pool that lost its last graph takes no other.
            pool = self._pools[device] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with _own_workspaces():
            # Other threads may use the GPU as they like meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                _break_off(graph, pool)
                del self._pools[device]
                raise
        graph.instantiate()
        self._alive.add(graph)
        return CudaGraph(graph, device, torch.cuda.memory_reserved(device) - before)

    def no_while_loop(self) -> str | None:
        return no_while_loop()

    def repeat(self, step: Graph, counter: Tensor, count: Tensor) -> Graph:
        assert isinstance(step, CudaGraph)
        with torch.cuda.device(counter.device):
            return WhileLoop(step.graph, counter, count)

    def unroll(self, step: Graph, times: int) -> Graph:
        assert isinstance(step, CudaGraph)
        with torch.cuda.device(step.device):
            return UnrolledLoop(step.graph, times, step.device)


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS's workspaces of a capture lie in the graph's pool, and nobody else has them.

    PyTorch keeps a workspace for each stream and hands it out again. Those that a warm-up made lie
    outside of the pool, and a graph would go on to use them after torch.compile's own graphs have
    freed them all. So they are freed before a capture, which makes its own, and those after it:
    the pool is kept by its graphs, not by a workspace.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # a CPU's PyTorch has none
    if clear is not None:
        clear()
    try:
        yield
    finally:
        if clear is not None:
            clear()


_broken: list[torch.cuda.CUDAGraph] = []


def _break_off(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed.

    Where the driver had ended it with an error, PyTorch 2.11's ``capture_end`` raises before it
    tells its allocators. The one of the GPU's memory would go on as if it captured and never free
    the pool; nothing public stops it, so two private functions do. The one of pinned memory asks
    the graph about each allocation from then on, so the graph has to stay. A later PyTorch tells
    them by itself, and then the first private function raises.
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
        return
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    if end is not None and release is not None:
        with contextlib.suppress(RuntimeError):
            end(torch.cuda.current_device(), pool)
            _broken.append(graph)
            release(torch.cuda.current_device(), pool)


def settle(warm_up: Callable[[], None]) -> None:
    """Work that was done twice does no more for the first time; it must draw no random numbers."""
    warm_up()  # kernels are compiled and chosen, which may draw some; workspaces are made
    with NoRandomNumbers():
        warm_up()


def draws(func: Any) -> bool:
    """Whether an operator of PyTorch draws random numbers."""
    # Attention has the tag for its dropout, which eval mode turns off.
    return torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name()


class NoRandomNumbers(TorchDispatchMode):
    """Raises where PyTorch's random numbers are drawn."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if draws(func):
            raise RuntimeError(
                f"the model draws random numbers ({func}), which a graph can't do anew at each step"
            )
        return func(*args, **(kwargs or {}))
