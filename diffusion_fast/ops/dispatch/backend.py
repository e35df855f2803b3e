"""The ways to compute an op, and how one of them is asked for.

Every op has one definition in plain PyTorch (``"reference"``); other backends compute the same
function faster where they can run. ``"auto"`` takes the fastest that can run a given call. A
backend that is asked for by name and can't run raises :class:`BackendError` with the reasons:
nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Fastest first: the order in which "auto" tries them.
BACKENDS = ("cuda", "triton", "cpu", "onednn", "sdpa", "reference")

Reasons = list[str]  # why not; empty for yes


class BackendError(RuntimeError):
    """A backend was asked for by name and can't run this call; the message says why.

    Examples:
        >>> try:
        ...     with df.use_backend("sdpa"):
        ...         y = df.ops.geglu(torch.randn(2, 8))
        ... except df.ops.BackendError as error:
        ...     print(error)
        geglu: backend 'sdpa' was asked for and can't run: not implemented for this op
    """


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. ``args`` are those of its reference, in order.

    Of the questions that follow, a None stands for "yes, whatever the call".

    Attributes:
        name: one of :data:`BACKENDS`.
        load: returns the function that computes; imports what that takes.
        machine: ``machine()``: why this machine can't run it.
        supports: ``supports(*args)``: why it can't run this call. It looks at what a signature
            holds and at nothing else.
        ready: ``ready(*args)``: why it won't run this call after all. It may compile or measure.
        foresee: ``foresee(*args)``: what ``ready`` will answer, or None where only the first call
            can tell.
        composite: made of PyTorch's differentiable functions, so that autograd, torch.func and fake
            tensors pass through it; everything else goes through the registered operator there.
        hidden: calls no operator of PyTorch's, so that what watches those (a counter, a recorder)
            is to see the registered operator.
        forward_only: can't run a call of which a gradient is recorded.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    machine: Callable[[], Reasons] | None = None
    supports: Callable[..., Reasons] | None = None
    ready: Callable[..., Reasons] | None = None
    foresee: Callable[..., Reasons | None] | None = None
    composite: bool = False
    hidden: bool = False
    forward_only: bool = False

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """The function that computes, loaded once."""
        return self.load()


@dataclass(frozen=True, eq=False)
class Overrides:
    """The backends asked for; compared by identity, see :func:`_overrides`.

    Process-wide, not per thread: a backward pass runs on autograd's own threads.
    """

    everywhere: str = "auto"
    per_op: tuple[tuple[str, str], ...] = ()


@functools.cache
def _overrides(everywhere: str, per_op: tuple[tuple[str, str], ...]) -> Overrides:
    """One object for each set of choices, which signatures can hold."""
    return Overrides(everywhere, per_op)


def _check_name(argument: str, name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")


def _from_environment() -> Overrides:
    name = os.environ.get("DIFFUSION_FAST_BACKEND", "auto")
    _check_name("DIFFUSION_FAST_BACKEND", name)
    return _overrides(name, ())


overrides = _from_environment()
known_ops: dict[str, Any] = {}  # name -> Op, filled by op.py


@contextlib.contextmanager
def use_backend(backend: str | None = None, **per_op: str) -> Iterator[None]:
    """Choose the backend of every op inside the ``with`` block, or of single ops by keyword.

    Args:
        backend: ``"reference"``, ``"triton"``, ``"cuda"``, ``"cpu"`` (C++ kernels for CPUs),
            ``"onednn"`` (products on a CPU), ``"sdpa"`` (attention) or ``"auto"``; None leaves what
            an outer block chose.
        per_op: the same for single ops, for example ``attention="sdpa"``.

    The choice is process-wide (a backward pass runs on autograd's own threads). A call that the
    chosen backend can't run raises :class:`BackendError` with the reasons.

    Raises:
        ValueError: a backend or op of this name doesn't exist.

    Examples:
        >>> with df.use_backend("reference"):
        ...     y = df.ops.geglu(torch.randn(2, 8))
        >>> y.shape
        torch.Size([2, 4])
    """
    global overrides
    if backend is not None:
        _check_name("backend", backend)
    for op, name in per_op.items():
        if op not in known_ops:
            raise ValueError(f"use_backend: expected ops among {', '.join(known_ops)}, got {op!r}")
        _check_name(op, name)
    before = overrides
    if backend is None:
        backend, per_op = before.everywhere, dict(before.per_op) | per_op
    overrides = _overrides(backend, tuple(sorted(per_op.items())))
    try:
        yield
    finally:
        overrides = before


def by_name() -> bool:
    """Whether the backend of any op is asked for by name."""
    return overrides.everywhere != "auto" or bool(overrides.per_op)


def requested(op: str) -> str:
    """The backend asked for by ``use_backend`` or DIFFUSION_FAST_BACKEND; usually ``"auto"``."""
    return dict(overrides.per_op).get(op, overrides.everywhere)
