"""Fewer threads than PyTorch has, for calls of this thread of the program alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

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
    before, outside = torch.get_num_threads(), getattr(_here, "most", None)
    if count == before:
        yield
        return
    _here.most = most()
    library.kernels.set_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() == count:  # otherwise somebody has set another number for good
            library.kernels.set_threads(before)
        _here.most = outside
