"""The Triton backend: whether this machine and this call can use it."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import measured as _measured
from .backend import Backend, Reasons, requested
from .checks import needs_gradient
from .op import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def machine() -> Reasons:
    """Why Triton kernels can't run on this machine."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    if _interpreted() or torch.cuda.is_available():
        return []
    return ["no CUDA device (TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"]


@functools.cache
def _interpreted() -> bool:
    """As triton sees it: it reads the variable once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tensors_fit(op: str, args: tuple[Any, ...]) -> Reasons:
    """Why no Triton kernel can take these tensors, whatever the op."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    device = tensors[0].device
    if device.type == "cpu":
        if not _interpreted() or requested(op) != "triton":
            return ["the tensors are on the CPU"]
    elif device.type != "cuda":
        return [f"the tensors are on {device}"]
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return ["the kernels need a GPU of compute capability 8.0 or later"]
    floating = (value.dtype for value in tensors if value.is_floating_point())
    return [f"dtype {dtype}" for dtype in floating if dtype not in DTYPES][:1]


def add(
    op: Op,
    kernels: Callable[[], ModuleType],
    supports: Callable[..., Reasons] | None = None,
    measured: bool = False,
    forward_only: bool = False,
) -> None:
    """Give an op the backend ``"triton"``.

    Args:
        op: the op.
        kernels: imports the file of kernels, at the first call; its function of the op's name takes
            the op's arguments.
        supports: why a call is out of the kernel's reach, beyond device and dtype.
        measured: whether "auto" takes the kernel only where it was measured to be faster than
            the op's reference.
        forward_only: as of a :class:`~.backend.Backend`.
    """

    def load() -> Callable[..., Any]:
        launcher: Callable[..., Any] = getattr(kernels(), op.name)
        return launcher

    def fits(*args: Any) -> Reasons:
        why = tensors_fit(op.name, args) or ([] if supports is None else supports(*args))
        asks = measured and requested(op.name) == "auto"
        return why or ([_measured.GRADIENT] if asks and needs_gradient(*args) else [])

    def ready(*args: Any) -> Reasons:
        if requested(op.name) != "auto":
            return []
        return _measured.ask(op.name, args, load(), op.reference, args[0].device)

    def foresee(*args: Any) -> Reasons | None:
        if requested(op.name) != "auto":
            return []
        return _measured.known(op.name, args, args[0].device)

    more: dict[str, Any] = {"ready": ready, "foresee": foresee} if measured else {}
    more |= {"hidden": True, "forward_only": forward_only}
    op.add(Backend("triton", load, machine, fits, **more))
