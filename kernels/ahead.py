"""Kernels compiled ahead of their first launch, by many processes, for any architecture.

The JIT itself binds, specialises and compiles, over a driver that knows an architecture and no
device. So what it leaves in ``$TRITON_CACHE_DIR`` is what a launch looks for there, on this machine
or, after :func:`move_in`, on another one with the same versions of triton and of these kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch, tuning

PROCESSES = 16  # at most
NOWHERE = -1  # the device that a driver without devices names
RECORDED = torch.device("meta")


class Launch(NamedTuple):
    """A launch without its data; it can be sent to another process.

    Attributes:
        module, kernel: where the kernel is.
        args: tensors stand for their dtype alone: the allocator aligns all of them.
        options: constants, and how many warps and stages.
    """

    module: str
    kernel: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    def warm_up(self) -> Any:
        """Triton's compiled kernel, made now or found in the cache."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return kernel.warmup(*self.args, grid=(1,), **self.options)


class Ahead(GPUDriver):
    """An architecture without a device: kernels compile for it and can't be launched."""

    def __init__(self, arch: int) -> None:  # that of the class asks torch for devices
        self.arch = arch
        self.get_device_capability = lambda device=None: divmod(arch, 10)
        self.get_current_device = lambda: NOWHERE
        self.get_current_stream = lambda device: 0
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return RECORDED

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def recording(arch: int = 0) -> Iterator[list[Launch]]:
    """The launches of the block, with tensors on the meta device; nothing runs.

    Where a configuration would be measured, each of the candidates is launched.

    Args:
        arch: the architecture that is launched for, 90 for sm_90; 0 for what runs on all of them.
    """
    found: list[Launch] = []

    def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        args = tuple(map(_without_data, args))
        found.append(Launch(kernel.fn.__module__, kernel.fn.__name__, args, options))

    before = launch.recorder, tuning.choose
    launch.recorder, tuning.choose = record, every_candidate
    try:
        with launch.planned_for(divmod(arch, 10)):
            yield found
    finally:
        launch.recorder, tuning.choose = before


def every_candidate(
    kernel: str,
    shape_class: tuple[object, ...],
    configs: Sequence[tuning.Config],
    run: Callable[[tuning.Config], object],
    device: torch.device,
) -> tuning.Config:
    """Takes the place of :func:`tuning.choose`: nothing is measured, all are launched."""
    for config in configs:
        run(config)
    return configs[0]


def _without_data(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_data, value))
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_without_data(value.base))
    return MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value


def programs(launches: Iterable[Launch], arch: int) -> list[Launch]:
    """A launch for each program that the JIT would compile, told apart by its own key."""
    seen: set[tuple[str, str, str]] = set()
    found = []

    def skip(*, key: str, fn: Any, **_: Any) -> bool:
        here = fn.module, fn.name, key
        if here not in seen:
            seen.add(here)
            found.append(one)
        return True  # it is not compiled

    before = knobs.runtime.jit_cache_hook, driver._active
    knobs.runtime.jit_cache_hook = skip
    driver.set_active(Ahead(arch))
    try:
        for one in launches:
            one.warm_up()
    finally:
        knobs.runtime.jit_cache_hook, driver._active = before
    return found


def compile_all(chosen: list[Launch], arch: int, processes: int | None = None) -> Iterator[int]:
    """Compile programs; yields how many are done.

    Args:
        chosen: what :func:`programs` found.
        arch: the architecture, 90 for sm_90.
        processes: how many work; by default as many as there are cores, :data:`PROCESSES` at most.

    Raises:
        RuntimeError: a program that doesn't compile, with its name and what triton said.
    """
    with compilers(arch, len(chosen), processes) as pool:
        waiting = {pool.submit(_compile, one): one for one in chosen}
        for done, future in enumerate(as_completed(waiting), 1):
            error = future.exception()
            if error is not None:
                one = waiting[future]
                raise RuntimeError(f"{one.module}.{one.kernel}: {error}") from error
            yield done


@contextlib.contextmanager
def compilers(arch: int, programs: int, processes: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes whose JIT compiles for an architecture; as for :func:`compile_all`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = processes or min(cores or 1, PROCESSES)
    # A process that was forked from one with CUDA or threads may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(max(min(workers, programs), 1), context, _begin, (arch,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(arch: int) -> None:
    driver.set_active(Ahead(arch))


def _compile(one: Launch) -> None:
    one.warm_up()


def cache_folder() -> Path:
    """Where triton keeps what it compiled."""
    return Path(knobs.cache.dir)


def move_in(folder: Path) -> None:
    """Make a cache that was carried to this place usable.

    Triton writes down a program's files by their full paths, and would compile it again.
    """
    for group in folder.glob("*/__grp__*.json"):
        try:
            said = json.loads(group.read_text())
            paths = {
                name: str(group.with_name(Path(p).name)) for name, p in said["child_paths"].items()
            }
        except (ValueError, KeyError, AttributeError):
            continue  # triton doesn't read it either
        if paths != said["child_paths"]:
            descriptor, temporary = tempfile.mkstemp(dir=group.parent, suffix=".tmp")
            with os.fdopen(descriptor, "w") as stream:
                json.dump(said | {"child_paths": paths}, stream)
            os.replace(temporary, group)  # whole at every moment
