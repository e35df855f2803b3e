"""The Triton backend: whether this machine and this call can use it, and how kernels are found."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend, choice
from .op import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def _machine(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if interpreted or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"


@functools.cache
def _interpreted() -> bool:
    """As triton sees it: it reads the variable once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why Triton kernels can't run on this machine; None if they can."""
    return _machine(_interpreted())


def _unsupported(op: str, args: tuple[Any, ...]) -> str | None:
    """Why no Triton kernel can take these tensors, whatever the op."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    device = tensors[0].device
    if device.type == "cpu":
        if not _interpreted() or backend.requested(op) != "triton":
            return "the tensors are on the CPU"
    elif device.type != "cuda":
        return f"the tensors are on {device}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later"
    for value in tensors:
        if value.is_floating_point() and value.dtype not in DTYPES:
            return f"dtype {value.dtype}"
    return None


def add(
    op: Op,
    stem: str,
    unsupported: Callable[..., str | None] | None = None,
    measured: bool = False,
) -> None:
    """Register ``diffusion_fast.kernels.<stem>.<op's name>``, imported at its first call.

    Args:
        op: gets the backend ``"triton"``.
        stem: the kernel's file.
        unsupported: why a call is out of the kernel's reach, beyond device and dtype.
        measured: whether "auto" takes the kernel only where it was measured to be faster than
            PyTorch's own.
    """
    plain = next(i.run for i in op.implementations if i.backend == "reference")

    def why_not(*args: Any) -> str | None:
        why = _unsupported(op.name, args) or (unsupported(*args) if unsupported else None)
        if why is None and measured and backend.requested(op.name) == "auto":
            return choice.why_not_triton(op.name, args, run, plain, args[0].device)
        return why

    def run(*args: Any) -> Any:
        module = importlib.import_module(f"diffusion_fast.kernels.{stem}")
        return getattr(module, op.name)(*args)

    op.add("triton", run, unavailable, why_not)
