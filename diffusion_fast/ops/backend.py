"""Which backend computes an op: the choice, its reasons, and how to override it.

Every op has one definition in plain PyTorch (``"reference"``); other backends compute the same
function faster where they can run. ``"auto"`` takes the fastest that can run a given call. A
backend that is asked for by name and can't run raises :class:`BackendError` with the reasons:
nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Fastest first: the order in which "auto" tries them.
BACKENDS = ("cuda", "triton", "onednn", "sdpa", "reference")


class BackendError(RuntimeError):
    """A backend was asked for by name and can't run this call; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``unavailable()`` says why this machine can't run it (None: it can) and ``unsupported(*args)``
    why it can't run this very call. ``native`` marks what needs no registration to be called
    eagerly: differentiable PyTorch operations, or code that refuses calls which need a gradient.
    ``composite`` marks the first of these, which torch.func can transform.
    """

    backend: str
    run: Callable[..., Any]
    unavailable: Callable[[], str | None]
    unsupported: Callable[..., str | None]
    native: bool = False
    composite: bool = False


@dataclass(frozen=True)
class Choice:
    """The backend chosen for an op, and for every other backend the reason why not."""

    op: str
    backend: str
    rejected: dict[str, str]
    last_ran: str | None = None

    def __str__(self) -> str:
        reasons = "".join(f"\n  not {name}: {why}" for name, why in self.rejected.items())
        ran = f", last ran {self.last_ran}" if self.last_ran else ""
        return f"{self.op}: {self.backend}{ran}{reasons}"


@dataclass
class _Overrides:
    """Process-wide, not per thread: a backward pass runs on autograd's own threads."""

    everywhere: str = "auto"
    per_op: dict[str, str] = field(default_factory=dict)

    def of(self, op: str) -> str:
        return self.per_op.get(op, self.everywhere)


def _check_name(argument: str, name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")


def _from_environment() -> _Overrides:
    name = os.environ.get("DIFFUSION_FAST_BACKEND", "auto")
    _check_name("DIFFUSION_FAST_BACKEND", name)
    return _Overrides(name)


overrides = _from_environment()
known_ops: dict[str, Any] = {}  # name -> Op, filled by ops/op.py


@contextlib.contextmanager
def use_backend(backend: str | None = None, **per_op: str) -> Iterator[None]:
    """Choose the backend of every op inside the ``with`` block, or of single ops by keyword.

    Args:
        backend: ``"reference"``, ``"triton"``, ``"cuda"``, ``"onednn"`` (products on a CPU),
            ``"sdpa"`` (attention) or ``"auto"``; None leaves what an outer block chose.
        per_op: the same for single ops, for example ``attention="sdpa"``.

    The choice is process-wide (a backward pass runs on autograd's own threads). A call that the
    chosen backend can't run raises :class:`BackendError` with the reasons.

    Raises:
        ValueError: a backend or op of this name doesn't exist.
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
        overrides = _Overrides(before.everywhere, before.per_op | per_op)
    else:
        overrides = _Overrides(backend, per_op)
    try:
        yield
    finally:
        overrides = before


def needs_gradient(*values: Tensor | None) -> bool:
    """Whether autograd would record a function of these tensors."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in values)


def requested(op: str) -> str:
    """The backend asked for by ``use_backend`` or DIFFUSION_FAST_BACKEND; usually ``"auto"``."""
    return overrides.of(op)


def explain(op: str | None = None, *args: Any) -> Any:
    """Which backend an op runs on, and why not the others.

    Args:
        op: an op's name, such as ``"attention"``; None for all of them.
        args: the arguments of a call, to ask about that call; without them the answer is about the
            machine.

    Returns:
        A :class:`Choice`, or a list of them; ``str()`` of one is readable.
    """
    if op is None:
        return [known.explain() for known in known_ops.values()]
    if op not in known_ops:
        raise ValueError(f"op: expected one of {', '.join(known_ops)}, got {op!r}")
    return known_ops[op].explain(*args)
