"""Variants of one computation, measured together: time in turns, memory, error, energy.

Every sample is wall time from an idle device to an idle device, over as many calls as make it long
enough to measure. So host time counts where it is not hidden, as it does for a user. Ratios are
medians over rounds of two times taken in the same round: drift of the machine cancels.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops.dispatch import known_ops

from ..lib.environment import GPU, energy_joules, free_memory, state_of_gpu, synchronize
from ..lib.timing import percentiles
from ..lib.traffic import max_error

Call = Callable[[], Tensor]
LEAST_ROUNDS, MOST_ROUNDS = 5, 100
SAMPLE_SECONDS = 0.01
# Before each turn on a CPU, where threads of the turn before it still spin. Then threads and caches
# are cold, so what takes less than the second number is called once more, untimed.
PAUSE_SECONDS, COLD_SECONDS = 0.05, 0.1
LONG_SECONDS = 10.0  # after a call that took so long under a profiler, no other says how long
ENERGY_SECONDS = 1.0


class NotRun(Exception):
    """A variant can't run here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Attributes:
        name: of the row.
        build: makes the call, weights and all; what it raises is why the row has no numbers.
        backend: what computes, or None for the ops of this library, which are asked.
        compiles: its first call takes much memory that later ones don't.
        of: what it computes, where several things are measured together: it has a truth of its
            own, and baselines with this in front of their names.
        holds: about how many bytes it takes for itself, beside the weights that all share.
        brief: makes a call in which the same ops are called in less time; None: there is none.
    """

    name: str
    build: Callable[[], Call]
    backend: str | None = None
    compiles: bool = False
    of: str = ""
    holds: int = 0
    brief: Callable[[], Call] | None = None


@dataclass
class _Ready:
    variant: Variant
    call: Call
    row: dict[str, Any]
    number: int
    short: bool
    seconds: list[float]


def measure(
    variants: Sequence[Variant],
    truth: Callable[[], Tensor] | str,
    *,
    images: int | None,
    steps: int,
    budget: float,
    rounds: int = LEAST_ROUNDS,
    in_files: int = 0,
    others: Mapping[str, Callable[[], Tensor]] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row for each variant, also for one that can't run: that has a ``reason``.

    Args:
        variants: the first of them are the baselines of the ratios, see :data:`BASELINES`.
        truth: what the result should be, in high precision; or the variant that has it.
        images, steps: that one call computes; None where it doesn't make whole images.
        budget: seconds to measure for, all variants together.
        rounds: the least number of them.
        in_files: bytes of shared weights for which there is memory while nothing else needs it.
        others: what variants of other things should compute, by :attr:`Variant.of`.
        timer: a clock in seconds.
    """
    truths = {"": truth, **(others or {})}
    expected: dict[str, Tensor | str] = {}
    for of in {one.of for one in variants}:
        found = truths[of]
        expected[of] = found if isinstance(found, str) else found().double().cpu()
    release()
    rows: dict[str, dict[str, Any]] = {one.name: {"variant": one.name} for one in variants}
    seconds: dict[str, list[float]] = {}
    first = sorted(variants, key=lambda one: one.name != truth)
    apart = in_files + sum(one.holds for one in variants) > free_memory()
    parts = [[one] for one in first] if apart else [first]
    for part in parts:
        ready = _all_prepared(part, rows, expected, timer)
        _take_turns(ready, budget / len(parts), rounds, timer)
        while ready:  # whose weights nothing keeps afterwards
            seconds |= _told(*ready.popitem(), images, steps, {"turns": APART} if apart else {})
        release()
    for variant in variants:
        for baseline in BASELINES:
            own = f"{variant.of} {baseline}".strip()
            if {own, variant.name} <= seconds.keys() and own != variant.name:
                times = seconds[own], seconds[variant.name]
                ratio = ratio_of_medians(*times) if apart else paired_ratio(*times)
                rows[variant.name][f"over_{baseline}"] = ratio
    return list(rows.values())


BASELINES = ("eager", "diffusers")
APART = "one after the other"  # how variants took turns that have no room beside each other


def _all_prepared(
    variants: Sequence[Variant],
    rows: Mapping[str, dict[str, Any]],
    expected: dict[str, Tensor | str],
    timer: Callable[[], float],
) -> dict[str, _Ready]:
    """Those that can run; the rows of the others say why they can't."""
    ready = {}
    for variant in variants:
        row = rows[variant.name]
        try:
            _check_room(variant)
            ready[variant.name] = _prepared(variant, row, expected, timer)
        except Exception as error:  # whatever it is, the row says it
            row["reason"] = reason(error)
        if GPU:
            release()
    return ready


def _told(
    name: str, one: _Ready, images: int | None, steps: int, more: dict[str, Any]
) -> dict[str, list[float]]:
    """Complete its row, and return its seconds by its name."""
    one.row |= _speed(one, images, steps) | state_of_gpu(after=one.call)
    one.row |= _energy(one, images, steps) | more
    return {name: one.seconds}


def _check_room(variant: Variant) -> None:
    free = free_memory()
    if variant.holds > free:
        raise NotRun(f"needs about {variant.holds / 1e9:.3g} GB, {free / 1e9:.3g} are free")


def _prepared(
    variant: Variant,
    row: dict[str, Any],
    expected: dict[str, Tensor | str],
    timer: Callable[[], float],
) -> _Ready:
    for op in known_ops.values():
        op.last_ran = None
    call, result, row["peak_bytes"], once = peak_memory(variant, timer)
    row["backend"] = variant.backend or backends_that_ran()
    wanted = expected[variant.of]
    if isinstance(wanted, Tensor):
        row["error"] = max_error(result, wanted)
    elif wanted == variant.name:
        expected[variant.of] = result.double().cpu()
    if once < LONG_SECONDS:
        synchronize()
        start = timer()
        call()
        synchronize()
        once = max(timer() - start, 1e-9)
    number = max(1, round(SAMPLE_SECONDS / once))
    return _Ready(variant, call, row, number, once < COLD_SECONDS, [])


def _take_turns(
    ready: dict[str, _Ready], budget: float, rounds: int, timer: Callable[[], float]
) -> None:
    start, order = timer(), list(ready)
    for done in range(max(rounds, MOST_ROUNDS)):
        if not ready or (done >= rounds and timer() - start > budget):
            return
        for name in order[done % len(order) :] + order[: done % len(order)]:
            one = ready[name]
            synchronize()
            if not GPU:
                time.sleep(PAUSE_SECONDS)
                if one.short:
                    one.call()
            begin = timer()
            for _ in range(one.number):
                one.call()
            synchronize()
            one.seconds.append((timer() - begin) / one.number)


def _speed(one: _Ready, images: int | None, steps: int) -> dict[str, Any]:
    speed: dict[str, Any] = {f"{p}_s": value for p, value in percentiles(one.seconds).items()}
    middle = speed["p50_s"]
    speed |= {"samples": len(one.seconds), "steps_per_s": steps / middle}
    return speed if images is None else speed | {"images_per_s": images / middle}


def _energy(one: _Ready, images: int | None, steps: int) -> dict[str, float]:
    """Joules of a step and an image; nothing where they can't be read."""
    joules = energy_joules(one.call, ENERGY_SECONDS)
    if joules is None:
        return {}
    energy = {"joules_per_step": joules / steps}
    return energy if images is None else energy | {"joules_per_image": joules / images}


def ratio_of_medians(baseline: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster the other is, where there are no common rounds."""
    return statistics.median(baseline) / statistics.median(other)


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster the other is, round by round."""
    return statistics.median(a / b for a, b in zip(baseline, other, strict=True))


def reason(error: Exception) -> str:
    """Why a variant did not run, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join(str(error).split())
    return (text if isinstance(error, NotRun) else f"{type(error).__name__}: {text}")[:200]


def backends_that_ran() -> str:
    """``"triton: geglu, layer_norm; sdpa: attention"``, of the ops called since the last reset."""
    by_backend: dict[str, list[str]] = {}
    for name in known_ops:
        ran = ops.explain(name).last_ran
        if ran is not None:
            by_backend.setdefault(ran, []).append(name)
    return "; ".join(f"{ran}: {', '.join(names)}" for ran, names in sorted(by_backend.items()))


# Memory ----------------------------------------------------------------------------------------


def peak_memory(
    variant: Variant, timer: Callable[[], float] = time.perf_counter
) -> tuple[Call, Tensor, int | None, float]:
    """The variant's call and result, the most bytes that it held beside the shared weights, and
    the seconds that the call took under a profiler; 0 without one.

    Counted from before it is built to after its first call: what is derived from the weights,
    buffers, graphs and activations. Without a GPU it is what PyTorch's allocator is asked for;
    None for a variant that compiles then, as the compiler's own work can't be told apart.
    """
    synchronize()
    if GPU:
        before = torch.cuda.memory_allocated()
        call = variant.build()
        if variant.compiles:
            call()
            synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call().clone()
        synchronize()
        return call, result, torch.cuda.max_memory_allocated() - before, 0.0
    if variant.compiles:
        call = variant.build()
        return call, call().clone(), None, 0.0
    if variant.backend is None:  # what is measured once for a machine is not measured below
        (variant.brief or variant.build)()()
        release()
    with _host_memory() as held:
        call = variant.build()
        start = timer()
        result = call().clone()
        seconds = timer() - start
    return call, result, held[0], seconds


@contextlib.contextmanager
def _host_memory() -> Iterator[list[int]]:
    """Fills the list with the peak of what was allocated inside the block."""
    from torch.profiler import ProfilerActivity, profile

    held: list[int] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler logs its start to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield held
    assert trace.profiler is not None
    results = trace.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    held.append(peak)


def release() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
