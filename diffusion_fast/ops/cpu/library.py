"""Builds, caches and loads the C++ kernels for CPUs.

The library is compiled once for each kind of vector instructions, by the machine's own C++
compiler, and kept in ``$DIFFUSION_FAST_CACHE`` or the user's cache folder. No timing decides who
computes: a process that finds the library there uses it from its first call on; one that doesn't
starts a compiler in the background and keeps PyTorch's own, until :func:`settle` waits for it. An
engine and a trainer do so before their first step. Where nothing can be compiled, it stays so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.cache import cache_folder
from ..building import BuildError, build_once, key_of, print_version, run, sources
from ..dispatch import Backend, Op, checks, known_ops
from ..dispatch.backend import requested

NAME = "cpu"
# By the names that PyTorch has for what it found; ATEN_CPU_CAPABILITY asks for less.
LEVELS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        "-mprefer-vector-width=512",
    ),
}
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-fvisibility=hidden", "-fopenmp", "-w"),
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu counts them
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as <malloc.h> numbers them
NO_MEMORY = "too little memory for what a kernel works with"
LATER = "it is compiled in the background; engines and trainers made from now on wait for it"

_lock = threading.RLock()
_building: Future[Path] | None = None
_answer: list[str] | None = None  # why the library isn't used; empty: it is; None: not asked yet
_final = False  # whether the answer stays for good
kernels: ctypes.CDLL  # once loaded: its functions, by name; a call releases the GIL


@cache
def level() -> str:
    """The vector instructions to use here, as PyTorch names them."""
    return str(torch.backends.cpu.get_cpu_capability())


@cache
def _openmp() -> str | None:
    """The OpenMP library that PyTorch has loaded: a second one would have threads of its own."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = (line.split()[-1] for line in maps if line.rstrip().endswith((".so", ".1", ".5")))
        for path in paths:
            if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
                return path
    return None


def _compiler() -> str:
    """The C++ compiler.

    Raises:
        BuildError: there is none; says what to install.
    """
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if cxx is None:
        raise BuildError("no C++ compiler: install g++, or set CXX")
    if print_version(cxx) is None:
        raise BuildError(f"the C++ compiler {cxx} does not run: install g++, or set CXX")
    return cxx


def key() -> str:
    """Of the kernels for this machine: another for other sources, flags or instructions."""
    return _key(sources() / NAME, level())


@cache
def _key(folder: Path, instructions: str) -> str:
    return key_of(folder.glob("*"), FLAGS, LEVELS[instructions], Path(_openmp() or "").name)


def _target() -> Path:
    return cache_folder() / f"cpu_{level()}_{key()}.so"


def machine() -> list[str]:
    """Why this machine can't run the kernels, and what to install; empty if it can."""
    if _final:
        return _answer or []
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return [f"the kernels are for Linux on x86-64, this is {sys.platform} on {_processor()}"]
    if level() not in LEVELS:
        return [f"the CPU has no AVX2 (PyTorch found {level()})"]
    if _openmp() is None:
        return ["this PyTorch has loaded no OpenMP library, whose threads the kernels use"]
    return [] if _target().exists() else _no_compiler()


@cache
def _no_compiler() -> list[str]:
    try:
        _compiler()
    except BuildError as error:
        return [str(error)]
    return []


def _processor() -> str:
    return platform.machine() or "an unknown processor"


def build() -> Path:
    """The library for this machine, from the cache or built.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the cache folder can't be written.
    """
    target = _target()

    def compile_all(scratch: Path) -> None:
        cxx, folder = _compiler(), sources() / NAME
        print(
            f"diffusion_fast: compiling kernels for this CPU ({level()}), once, into {target}",
            file=sys.stderr,
            flush=True,
        )
        files = sorted(folder.glob("*.cpp"))
        objects = [str(scratch / f"{file.stem}.o") for file in files]
        commands = [
            [cxx, *FLAGS, *LEVELS[level()], "-c", str(file), "-o", made]
            for file, made in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(run, commands))
        run([cxx, "-shared", "-o", str(scratch / target.name), *objects, str(_openmp())])

    return build_once(target, compile_all)


def begin() -> None:
    """Start compiling in the background, where that is still to be done; never waits."""
    global _building
    with _lock:
        if _building is not None or _final or machine() or _target().exists():
            return
        _building = Future()
    threading.Thread(target=_build_into, args=(_building,), daemon=True).start()


def _build_into(result: Future[Path]) -> None:
    try:
        result.set_result(build())
    except BaseException as error:
        result.set_exception(error)


def settle() -> list[str]:
    """Wait until the kernels are there, and use them from now on; what was decided is forgotten.

    Returns:
        Why they can't be used; empty if they are.
    """
    global _answer, _final
    begin()
    if _final or machine():
        return machine()
    try:
        path = _target() if _building is None else _building.result()
        why = []
    except (BuildError, OSError) as error:
        why = [f"the kernels for this CPU could not be built: {error}"]
    with _lock:
        if _final:  # by another thread that waited too
            return machine()
        if not why:
            why = _load(path)
        if why:
            warnings.warn(f"{why[0]}\nPyTorch's own are used instead.", stacklevel=3)
        _answer, _final = why, True
        for op in known_ops.values():
            if any(backend.name == NAME for backend in op.backends):
                op.forget()
        return why


def _load(path: Path) -> list[str]:
    global kernels
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        return [f"the kernels for this CPU could not be loaded: {error}"]
    _keep_memory()
    return []


def _keep_memory() -> None:
    """Have glibc give out results of tens of MB from memory that it keeps.

    By default it maps blocks of 32 MB and more anew at each call, and the system zeroes their
    pages: 13 % of a product of 8192 x 320 by 320 x 2560 on two cores of Zen 3. What the user's
    environment says of it stands.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2**27)
        mallopt(_TRIM_THRESHOLD, 2**28)


def _decided(op: str) -> list[str]:
    """Why a call is not for the kernels after all; decided once, as far as nobody waits."""
    global _answer
    if requested(op) == NAME:
        return settle()
    with _lock:
        if _answer is None:
            _answer = [] if _target().exists() else [LATER]
            if not _answer:
                return settle()
            begin()
        return _answer


def _foresee() -> list[str]:
    if _answer is not None:
        return _answer
    return [] if _target().exists() else [LATER]


def add(
    op: Op,
    load: Callable[[], Callable[..., Any]],
    supports: Callable[..., list[str]] | None = None,
    slower: Callable[..., list[str]] | None = None,
    forward_only: bool = False,
) -> None:
    """Give an op the backend ``"cpu"``.

    Args:
        op: the op.
        load: returns the function that takes the op's arguments; asked once the library is loaded.
        supports: why a call is out of the kernel's reach, beyond device and dtype.
        slower: why "auto" takes another way to a call.
        forward_only: as of a :class:`~..dispatch.Backend`.
    """

    def fits(*args: Any) -> list[str]:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if tensors[0].device.type != "cpu":
            return [f"the tensors are on {tensors[0].device}"]
        for value in tensors:
            if value.is_floating_point() and value.dtype not in DTYPES:
                return [f"dtype {value.dtype}"]
        if not all(value.numel() for value in tensors):
            return ["a tensor is empty"]
        return [] if supports is None else supports(*args)

    def ready(*args: Any) -> list[str]:
        why = (_answer or []) if _final else _decided(op.name)
        return why or ([] if slower is None else slower(*args))

    def foresee(*args: Any) -> list[str]:
        return _foresee() or ([] if slower is None else slower(*args))

    op.add(
        Backend(NAME, load, machine, fits, ready, foresee, hidden=True, forward_only=forward_only)
    )


def first_order(*args: Any) -> list[str]:
    """Why a kernel can't compute a gradient: autograd is to differentiate it once more."""
    return ["a gradient of the gradient is needed"] if checks.needs_gradient(*args) else []


def state() -> str:
    """A line for ``diffusion-fast doctor``."""
    why = machine()
    if why:
        return f"none: {why[0]}"
    built = _target().exists()
    return f"{level()}, {_target() if built else 'compiled on first use'}"
