"""Triton or the reference: measured once for each shape on each GPU, and kept on disk.

The libraries behind a reference (cuBLAS, cuDNN, flash attention) are hard to beat at some shapes
and easy at others, so that for products and attention "auto" asks the clock. In a process the same
call always gets the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import Reasons

_answers: dict[tuple[Any, ...], Reasons] = {}

SLOWER = "the reference was measured faster at this shape"
CAPTURED = "it was first called in a capture, where nothing can be measured"
GRADIENT = "a gradient is needed, and PyTorch's own has the cheaper backward pass"


def known(op: str, args: tuple[Any, ...], device: torch.device) -> Reasons | None:
    """What was found about Triton for this call, in this process or an earlier one; None: nothing.

    Args:
        op: the op's name.
        args: the call's arguments.
        device: the tensors' GPU.
    """
    key = _key(op, args, device)
    if key in _answers:
        return _answers[key]
    from ...kernels import tuning

    best = tuning.known(f"backend of {op}", key[2:], device)
    return None if best is None else _reasons(best)


def ask(
    op: str,
    args: tuple[Any, ...],
    triton: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
) -> Reasons:
    """Nothing where Triton is the faster way to this call; otherwise what speaks against it.

    Args:
        op: the op's name.
        args: the call's arguments.
        triton, plain: the two ways to compute it.
        device: the tensors' GPU.
    """
    key = _key(op, args, device)
    if key not in _answers:
        found = known(op, args, device)
        if found is None and torch.cuda.is_current_stream_capturing():
            found = [CAPTURED]
        _answers[key] = _measured(op, args, key, triton, plain, device) if found is None else found
    return _answers[key]


def _measured(
    op: str,
    args: tuple[Any, ...],
    key: tuple[Any, ...],
    triton: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
) -> Reasons:
    from ...kernels import tuning  # imports triton

    ways = {"reference": plain, "triton": triton}

    def run(name: str) -> None:
        with torch.no_grad():
            ways[name](*args)

    return _reasons(repr(tuning.choose(f"backend of {op}", key[2:], tuple(ways), run, device)))


def _reasons(best: str) -> Reasons:
    """``best``: the faster way's name, as tuning keeps it."""
    return [] if best == repr("triton") else [SLOWER]


def _key(op: str, args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return (op, device, *map(shape_of, args))


def shape_of(value: Any) -> Any:
    """What the speed depends on: everything but a tensor's numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(shape_of, value))
    return value
