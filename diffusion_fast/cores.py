"""How many cores a process may use at once, threads beyond that, and waits for a core."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from pathlib import Path

import torch

THREADS = "OMP_NUM_THREADS"  # the variable by which users say how many


def core_limit(root: Path = Path("/")) -> int | None:
    """Cores' worth of time that the control group grants, rounded up; None without a limit.

    Containers are limited so (``docker run --cpus``, Kubernetes' limits). PyTorch counts cores, and
    threads beyond the limit make all of them stand still for most of each period.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    cores = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        # In a container the path may be the host's, and the top the container's own.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                cores += _quota(folder)
    return max(1, math.ceil(min(cores))) if cores else None


def _quota(group: Path) -> list[float]:
    """A control group's quota by its period: one number, or none without a limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return [int(quota) / int(period)] if quota not in ("max", "-1") else []
        except (OSError, ValueError):
            continue
    return []


def _exceeded() -> int | None:
    """The :func:`core_limit` that threads are beyond, whose number nobody asked for."""
    limit = core_limit()
    asked = os.environ.get(THREADS)
    return None if limit is None or asked or torch.get_num_threads() <= limit else limit


def _line(limit: int) -> str:
    threads = torch.get_num_threads()
    return f"PyTorch uses {threads} threads, and this container may use {limit} cores at once"


def warn_of_threads() -> None:
    """Warn of threads beyond :func:`core_limit`; a library doesn't change their number."""
    if limit := _exceeded():
        line = f"{_line(limit)}: call torch.set_num_threads, or set {THREADS}"
        warnings.warn(line, stacklevel=3)


def limit_threads() -> str | None:
    """Have no more threads than :func:`core_limit`, in a program of one's own.

    Returns:
        A line that says so; None where nothing was changed.
    """
    limit = _exceeded()
    if limit is None:
        return None
    line = f"{_line(limit)}: as many threads are used; {THREADS} sets others"
    torch.set_num_threads(limit)
    return line


def waited(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds for which threads of this process were ready to run and had no core, all together.

    They grow where other programs, or more threads than cores, are at work. 0 where the system
    does not say.

    Args:
        tasks: where Linux has a folder for each thread.
    """
    nanoseconds = 0
    for file in tasks.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # of a thread that has ended
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9
