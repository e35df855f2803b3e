"""Times on a device, and the rates that it could reach."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .environment import synchronize


def captured(call: Callable[[], Any], calls: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``calls`` calls in a row, and what the last of them returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            output = call()
    return graph, output


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def best_seconds(call: Callable[[], object]) -> float:
    """The least of twenty times of a call, each over five calls in a row."""
    seconds = []
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        for _ in range(5):
            call()
        synchronize()
        seconds.append((time.perf_counter() - start) / 5)
    return min(seconds)


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices on the GPU."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * n**3 / best_seconds(lambda: torch.mm(a, b, out=c))


@functools.cache
def copy_rate() -> float:
    """Bytes per second of a large copy on the GPU, read and write counted."""
    source = torch.empty(2**29, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source))


@functools.cache
def flush_buffer() -> Tensor:
    """Memory that fills the L2 cache when it is written to."""
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(max(size, 2**26), dtype=torch.int8, device="cuda")
