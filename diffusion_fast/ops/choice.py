"""Triton or PyTorch's own: measured once for each shape on each GPU, and kept on disk.

cuBLAS and cuDNN are hard to beat at some shapes and easy at others, so that for products "auto"
asks the clock. In a process the same call always gets the same answer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend

_answers: dict[tuple[Any, ...], str | None] = {}

SLOWER = "PyTorch's own was measured faster at this shape"
CAPTURED = "it was first called in a capture, where nothing can be measured"
GRADIENT = "a gradient is needed, and PyTorch's own has the cheaper backward pass"


def why_not_triton(
    op: str,
    args: tuple[Any, ...],
    triton: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
) -> str | None:
    """None where Triton is the faster way to this call; otherwise what speaks against it.

    Args:
        op: its name.
        args: of the call.
        triton, plain: the two ways to it.
        device: of the tensors, a GPU.
    """
    if backend.needs_gradient(*(value for value in args if isinstance(value, Tensor))):
        return GRADIENT
    key = (op, device, *map(_shape, args))
    if key not in _answers:
        _answers[key] = _ask(op, args, key, triton, plain, device)
    return _answers[key]


def _shape(value: Any) -> Any:
    """What the speed depends on: everything but a tensor's numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return value


def _ask(
    op: str,
    args: tuple[Any, ...],
    key: tuple[Any, ...],
    triton: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
) -> str | None:
    tuning = importlib.import_module("diffusion_fast.kernels.tuning")  # imports triton
    ways = {"reference": plain, "triton": triton}

    def run(name: str) -> None:
        with torch.no_grad():
            ways[name](*args)

    name, shapes = f"backend of {op}", key[2:]
    if torch.cuda.is_current_stream_capturing() and not tuning.known(name, shapes, device):
        return CAPTURED
    best = tuning.choose(name, shapes, tuple(ways), run, device)
    return None if best == "triton" else SLOWER
