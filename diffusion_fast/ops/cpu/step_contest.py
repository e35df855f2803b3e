"""How a whole step of a network is the fastest on this CPU: measured once, and kept on disk.

It is found as the ways of single ops are (:mod:`.contest`), once these are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..dispatch.backend import by_name
from . import contest, library, threads
from .contest import GAIN, Calls, Time, Work

LONG, LARGE = 0.05, 10**10  # seconds, and multiply-adds, in which there is work for all threads
WARM = 3  # calls before those that count: the third one is recorded


def threads_for(work: Work, step: Callable[[], object]) -> int:
    """The number of threads with which a step takes the least time, PyTorch's at most.

    In a small network an op is done in microseconds, in which threads can't even begin together.
    Measured once for each network, machine and number of PyTorch's threads; one for a tiny network.

    Args:
        work: the step's calls; where it has no name, all threads are used. So they are where a
            backend is asked for by name, and without kernels for this CPU.
        step: what is measured; it is called several times.
    """
    most = threads.most()
    if most == 1 or _is_fixed(work):
        return most
    if work.tiny:
        return 1

    def valid(count: str) -> bool:
        return count.isdecimal() and 1 <= int(count) <= most

    return int(_of_step(work, "threads", str(most), valid, lambda: _fastest(step, most)))


def way_of_step(work: Work, about: str, ways: Mapping[str, Callable[[], object]]) -> str:
    """Which way to compute a step takes the least time, measured as for :func:`threads_for`.

    Args:
        work: the step's calls; where it has no name, the first way is taken.
        about: what the ways are ways of.
        ways: each computes a step; all but the first have a handicap.
    """
    first = next(iter(ways))
    if len(ways) == 1 or _is_fixed(work):
        return first
    return _of_step(work, about, first, ways.__contains__, lambda: _first_of(ways))


def _is_fixed(work: Work) -> bool:
    """Whether a step is not measured, whatever it takes."""
    return bool(library.machine()) or not work.name or by_name()


def _of_step(
    work: Work,
    about: str,
    otherwise: str,
    valid: Callable[[str], bool],
    measured: Callable[[], tuple[str, bool]],
) -> str:
    """What was found about a step, now or by another process; ``otherwise`` if it is large."""
    key = work.key(about)
    found, _, doubt = contest.known().get(key, "").partition(" ")
    if not valid(found) or doubt:
        small = 0 < _multiply_adds(work.calls()) < LARGE
        new, sure = measured() if small else (otherwise, True)
        found = new if sure or not valid(found) else found
        contest.decide(key, found, sure)
    return found


def _multiply_adds(calls: Calls) -> int:
    """Those of the products and convolutions, and of convolutions' gradients."""
    count = 0
    for name, args in calls:
        if name in ("linear", "conv2d"):
            x, weight, times = *args[:2], 1
        elif name == "conv2d_backward":
            x, weight, times = *args[1:3], sum(args[-1][:2])
        else:
            continue
        count += times * x.numel() // weight.shape[1] * weight.numel()  # a weight is [N, K, ...]
    return count


def _fastest(step: Callable[[], object], most: int) -> tuple[str, bool]:
    """The number of threads that is the fastest: all of them, or half as many, and so on.

    And whether its times are such for which they had the cores.
    """
    count = best = most
    least = _by(most, step)
    sure = not least.disturbed
    while count > 1 and (least.seconds < LONG or least.disturbed):
        count //= 2
        found = _by(count, step)
        sure &= not found.disturbed
        if found.seconds > GAIN * least.seconds:
            break
        best, least = count, found
    return str(best), sure


def _first_of(ways: Mapping[str, Callable[[], object]]) -> tuple[str, bool]:
    """The way that is the fastest with all threads, and whether they had the cores."""
    times = {name: _by(threads.most(), run) for name, run in ways.items()}
    seconds = {name: time.seconds for name, time in times.items()}
    seconds[next(iter(ways))] *= GAIN
    return min(seconds, key=seconds.__getitem__), not max(times.values()).disturbed


def _by(count: int, step: Callable[[], object]) -> Time:
    """The least time of a step by so many threads."""
    with threads.using(count):
        for _ in range(WARM):
            step()
        return contest.least_times({"": step})[""]
