"""What a step costs by its ops, and how fast this GPU could do that at best."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

import torch

from diffusion_fast.engine.cost import Bench, Counter
from diffusion_fast.engine.plan import make_plan

from .environment import GPU
from .networks import TOKENS, Kind


def step_cost(
    kind: Kind, dtype: torch.dtype, batch: int, rewrites: str | Iterable[str] = "all"
) -> Counter:
    """Launches, bytes and FLOPs of a step of ``batch`` images with guidance, by op."""
    bench = Bench(kind.unet, dtype, 2 * batch, (kind.side, kind.side), TOKENS)
    plan = {"batch": batch, "halves": 2, "max_rows": 1, "rewrites": rewrites}
    return bench.step(lambda twin: make_plan(twin, **plan))


def limit_seconds(cost: Counter, dtype: torch.dtype) -> float | None:
    """The least time of a step on this GPU, None without one.

    A roofline for each kind of op: its FLOPs at the rate of a large product, or its bytes at that
    of a large copy, whichever takes longer; both rates are measured here.
    """
    if not GPU:
        return None
    flops, bandwidth = product_rate(dtype), copy_rate()
    return sum(max(one.flops / flops, one.bytes / bandwidth) for one in cost.by_op.values())


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=c))


@functools.cache
def copy_rate() -> float:
    """Bytes per second of a large copy, read and write counted."""
    source = torch.empty(2**29, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 5)
    return min(seconds)
