"""Fewer threads than PyTorch has, for calls of this thread of the program alone."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import library

_here = threading.local()


def most() -> int:
    """PyTorch's number of threads here, as it is outside of :func:`using`."""
    found: int | None = getattr(_here, "most", None)
    return torch.get_num_threads() if found is None else found


@contextlib.contextmanager
def using(count: int) -> Iterator[None]:
    """Share the work of each op among so many threads at most; the kernels must be loaded.

    ``torch.set_num_threads`` would do so for threads of the program that begin meanwhile, too.
    """
    before, outside, of_mkl = torch.get_num_threads(), getattr(_here, "most", None), _mkl()
    if count == before:
        yield
        return
    _here.most = most()
    library.kernels.set_threads(count)
    mkl_before = of_mkl(count)
    try:
        yield
    finally:
        if torch.get_num_threads() == count:  # otherwise somebody has set another number for good
            library.kernels.set_threads(before)
            of_mkl(mkl_before)
        _here.most = outside


@functools.cache
def _mkl() -> Callable[[int], int]:
    """Sets the number of this thread of the program in the MKL that PyTorch holds, and returns the
    one before; 0 stands for OpenMP's, which ``torch.set_num_threads`` replaces.
    """
    try:
        held = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found: Callable[[int], int] = held.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # a build without MKL
        return lambda count: count
    return found
