"""The choice among a few configurations of a kernel: measured once per GPU and shape class.

Results live in one JSON file per GPU and version (of torch, triton and these kernels' own source)
under ``$DIFFUSION_FAST_CACHE``, or the platform's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton

from . import launch
from .measurements import file_of, remember, results

Config = TypeVar("Config")

REPEATS = 10  # launches per captured graph
ROUNDS = 7  # replays of each graph, taken in turns; the median counts


def choose(
    kernel: str,
    shape_class: tuple[object, ...],
    configs: Sequence[Config],
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The fastest of ``configs`` for this class of shapes; the first where nothing can be measured.

    Args:
        kernel: the name of what is tuned.
        shape_class: whatever the choice depends on; calls that share it share the result.
        configs: candidates with a repr that tells them apart, the safest guess first.
        run: launches the kernel with one of them. It is called several times, so it may write only
            what it overwrites.
        device: device of the tensors.

    Nothing is measured in the interpreter, without a GPU, or while a graph is being captured.
    """
    if len(configs) == 1 or device.type != "cuda" or launch.INTERPRETED:
        return configs[0]
    file, key = cache_file(device), f"{kernel} {shape_class}"
    by_name = {repr(config): config for config in configs}
    known = results(file).get(key)
    if known in by_name:
        return by_name[known]
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    seconds = _measure(configs, run, device)
    best = min(range(len(configs)), key=seconds.__getitem__)
    remember(file, key, repr(configs[best]))
    return configs[best]


def known(kernel: str, shape_class: tuple[object, ...], device: torch.device) -> str | None:
    """The repr of what :func:`choose` found for this class of shapes; None: it must measure."""
    return results(cache_file(device)).get(f"{kernel} {shape_class}")


def _measure(
    configs: Sequence[Config], run: Callable[[Config], object], device: torch.device
) -> list[float]:
    """Median device time of each config, over graph replays taken in turns.

    Each launch finds an L2 cache that holds other data, as in a step, which streams more weights
    than the cache holds. Writing these data takes the same time for every config.
    """
    graphs = []
    with torch.cuda.device(device):
        other = torch.empty(2 * _l2(device), dtype=torch.int8, device=device)
        stream = _stream(device)
        for config in configs:
            run(config)  # compiles, which must not happen in the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(REPEATS):
                    other.zero_()
                    run(config)
            graphs.append(graph)
        times: list[list[float]] = [[] for _ in configs]
        for _ in range(ROUNDS):
            for graph, taken in zip(graphs, times, strict=True):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                taken.append(start.elapsed_time(stop))
    return [statistics.median(taken) for taken in times]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one of all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def _l2(device: torch.device) -> int:
    """Bytes of the L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@functools.cache
def _version() -> str:
    """Of everything a measurement depends on besides the GPU."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"torch{torch.__version__}-triton{triton.__version__}-{digest.hexdigest()[:12]}"


@functools.cache
def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}-sm{properties.major}{properties.minor}"


def cache_file(device: torch.device) -> Path:
    return file_of(_gpu(device), _version())
