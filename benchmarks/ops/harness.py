"""How this project measures: device time over graph replays, variants taken in turns.

    pytest benchmarks/ops/bench_geglu.py --benchmark-enable --benchmark-json=geglu.json

A benchmark file describes problems; here each becomes one row per variant: ``eager`` (plain PyTorch
as one writes it), ``compile`` (the same under torch.compile), ``ours`` and, where it is installed,
``liger``. pytest-benchmark drives and stores the rows; device time, bytes, error and the machine
stand in their ``extra_info``. Without a GPU only the reference runs, on a small shape, and says so;
the byte counts of the full shape stand all the same.

Bytes needed: every input and output once. Bytes moved: for eager, the sum over the operators that
it really dispatches; for compile, Inductor's own count; for our kernels, by their design.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Inductor counts bytes when it compiles, not when it finds a kernel in its caches.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from diffusion_fast import ops

from ..lib.environment import GPU, environment, state_of_gpu
from ..lib.timing import captured, copy_rate, flush_buffer, percentiles
from ..lib.traffic import bytes_moved, max_error, nbytes

VARIANTS = ("eager", "compile", "ours", "liger")
CALLS = 20  # in one captured graph
ROUNDS = 25  # replays of each variant's graph, taken in turns
DEVICE = "cuda" if GPU else "cpu"

Call = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """What is computed, and how.

    Args:
        inputs: by keyword, to every variant.
        eager: plain PyTorch.
        ours: the op of this library.
        moved: bytes that our kernels read and write.
        op: the op's name, to ask which backend ran.
        needed: bytes of inputs and outputs, each once; None counts those of ``inputs`` and of what
            ``eager`` returns.
        liger: the same by Liger, None if it has no such kernel or isn't installed.
    """

    inputs: dict[str, Tensor]
    eager: Call
    ours: Call
    moved: int
    op: str
    needed: int | None = None
    liger: Call | None = None


@dataclass(frozen=True)
class Case:
    """A problem at a model's shape, and at a small one for machines without a GPU."""

    name: str
    build: Callable[..., Problem]  # (*shape, device)
    shape: tuple[Any, ...]
    small: tuple[Any, ...]

    def __str__(self) -> str:
        return self.name


def with_backward(call: Call) -> Call:
    """The call and its gradients for every floating input."""

    def both(**inputs: Tensor) -> Any:
        leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
        y = call(**leaves)
        wanted = [v for v in leaves.values() if v.requires_grad]
        return y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))

    return both


def inductor_metrics() -> Any:
    """Where Inductor adds up the bytes of what it compiles; it only does so for its log."""
    logging.getLogger("torch._inductor.compile_fx.__inductor_metrics").setLevel(logging.INFO)
    return importlib.import_module("torch._inductor.metrics")


def needed_bytes(problem: Problem) -> int:
    if problem.needed is not None:
        return problem.needed
    return nbytes(problem.inputs, problem.eager(**problem.inputs))


def liger(name: str) -> Any:
    """A function of Liger's; None where it is not installed."""
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    return getattr(functional, name)


# Time ------------------------------------------------------------------------------------------


def _capture(call: Callable[[], object], flush: bool) -> torch.cuda.CUDAGraph:
    """CALLS times the call, each after writing over the L2 cache if asked to."""

    def flushed() -> None:
        flush_buffer().zero_()
        call()

    return captured(flushed if flush else call, CALLS)[0]


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds per call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop) / CALLS


def device_times(calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, list[float]]]:
    """Microseconds of each variant, ``hot`` (in L2 as far as it fits) and ``cold`` (L2 flushed)."""
    flush_buffer()
    hot = {name: _capture(call, False) for name, call in calls.items()}
    cold = {name: _capture(call, True) for name, call in calls.items()}
    flush = _capture(lambda: None, True)
    times: dict[str, dict[str, list[float]]] = {n: {"hot": [], "cold": []} for n in calls}
    for _ in range(ROUNDS):
        for name in calls:
            times[name]["hot"].append(_replay(hot[name]))
            # The flush is in the graph, so its own time, taken right beside, is taken off.
            times[name]["cold"].append(_replay(cold[name]) - _replay(flush))
    return times


# Rows ------------------------------------------------------------------------------------------


def _calls(problem: Problem) -> dict[str, Call]:
    calls = {"eager": problem.eager, "ours": problem.ours}
    calls["compile"] = torch.compile(problem.eager, dynamic=False)
    if problem.liger is not None:
        calls["liger"] = problem.liger
    return calls


@functools.lru_cache(maxsize=1)
def _measured(case: Case) -> dict[str, dict[str, Any]]:
    """Every variant of a case, measured together; the rows."""
    # Otherwise, after some shapes of one function, torch.compile leaves it as it is.
    torch._dynamo.reset()
    problem = case.build(*case.shape, device=DEVICE)
    inductor = inductor_metrics()
    needed, rows = needed_bytes(problem), {}
    eagerly = bytes_moved(problem.eager, **problem.inputs)
    double = tree_map(lambda v: v.double() if v.is_floating_point() else v, problem.inputs)
    truth = problem.eager(**double)
    bound = {}
    for name, call in _calls(problem).items():
        inductor.reset()
        row: dict[str, Any] = {"error": max_error(call(**problem.inputs), truth)}
        moved = {"eager": eagerly, "ours": problem.moved}.get(name)
        row["bytes_moved"] = inductor.num_bytes_accessed if name == "compile" else moved
        row["backend"] = ops.explain(problem.op).last_ran if name == "ours" else name
        rows[name], bound[name] = row, functools.partial(call, **problem.inputs)
    for name, times in device_times(bound).items():
        row = rows[name]
        row |= {f"{kind}_us": percentiles(samples) for kind, samples in times.items()}
        row["bytes_needed"] = needed
        if row["bytes_moved"]:
            row["moved_over_needed"] = row["bytes_moved"] / needed
        rate = needed / (1e-6 * row["cold_us"]["p50"])
        row |= {"GB_per_s": rate / 1e9, "share_of_copy": rate / copy_rate()}
    return rows


def run(benchmark: Any, case: Case, variant: str) -> None:
    """One row: time ``variant`` of ``case`` and store what is known of it."""
    full = case.build(*case.shape, device="meta")
    needed = needed_bytes(full)
    benchmark.extra_info.update(environment())
    benchmark.extra_info.update({"case": case.name, "variant": variant, "bytes_needed": needed})
    if not GPU:
        if variant not in ("eager", "ours"):
            pytest.skip("needs a CUDA device")
        moved = full.moved if variant == "ours" else bytes_moved(full.eager, **full.inputs)
        small = case.build(*case.small, device="cpu")
        call = small.ours if variant == "ours" else small.eager
        benchmark.extra_info.update(
            mode="CPU reference on a small shape: says nothing about a GPU",
            shape_run=str(case.small),
            bytes_moved=moved,
            moved_over_needed=moved / needed,
        )
        benchmark.pedantic(call, kwargs=small.inputs, rounds=5, warmup_rounds=1)
        benchmark.extra_info["backend"] = (
            ops.explain(small.op).last_ran if variant == "ours" else "eager"
        )
        return
    if variant == "liger" and full.liger is None:
        pytest.skip("no such kernel in Liger, or Liger is not installed")
    benchmark.extra_info.update(_measured(case)[variant])
    problem = case.build(*case.shape, device=DEVICE)
    call = _calls(problem)[variant]

    def wall() -> None:
        call(**problem.inputs)
        torch.cuda.synchronize()

    benchmark.pedantic(wall, rounds=20, warmup_rounds=5)
    benchmark.extra_info.update(state_of_gpu(after=wall))
