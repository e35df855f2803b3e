"""The one way kernels are launched, and what every launcher asks about its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

# Whether triton was imported with TRITON_INTERPRET=1: then kernels run on the host, one program
# after another.
INTERPRETED = isinstance(tl.zeros_like, InterpretedFunction)

# When set, it is called with (kernel, arguments, options) instead of launching. Ahead-of-time
# compilation uses it to see exactly what each launcher passes, with tensors on the meta device.
recorder: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any
) -> None:
    """Launch ``kernel`` on the current stream of ``device``; an empty grid is nothing to do.

    Raises:
        RuntimeError: the tensors are on the CPU and triton was imported without TRITON_INTERPRET=1.
    """
    if 0 in grid:
        return
    if recorder is not None:
        recorder(kernel, args, options)
        return
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **options)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, those of an H200 where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; that of :func:`planned_for` where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return _planned


_planned = (0, 0)


@contextlib.contextmanager
def planned_for(capability: tuple[int, int]) -> Iterator[None]:
    """Launches of tensors that are on no GPU are those for one of this compute capability."""
    global _planned
    before, _planned = _planned, capability
    try:
        yield
    finally:
        _planned = before


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type a kernel computes in: float64 for float64, float32 for everything else."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def torch_accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def wide(*tensors: Tensor | None) -> bool:
    """Whether an offset inside one of the tensors needs 64 bits."""
    return any(
        tensor is not None
        and sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31
        for tensor in tensors
    )


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with the strides of ``like``: itself where it has them, a copy otherwise."""
    for size, mine, wanted in zip(like.shape, value.stride(), like.stride(), strict=True):
        if size > 1 and mine != wanted:
            return torch.empty_like(like, dtype=value.dtype).copy_(value)
    return value


def dense_batch(value: Tensor) -> tuple[int, int, int]:
    """A dense tensor's memory as [outer, B, inner], B being dimension 0 wherever it lies."""
    batch = value.shape[0]
    inner = value.stride(0) if batch > 1 else value.numel()
    return value.numel() // max(batch * inner, 1), batch, inner


def image_strides(value: Tensor) -> tuple[int, int, int] | None:
    """Strides of [B, C, ...] seen as [B, C, S]; None where the space does not collapse."""
    inner: int | None = None
    expected = 0
    for size, stride in zip(reversed(value.shape[2:]), reversed(value.stride()[2:]), strict=True):
        if size == 1:
            continue
        if inner is None:
            inner = stride  # 0 for an expanded tensor
        elif stride != expected:
            return None
        expected = stride * size
    return value.stride(0), value.stride(1), 1 if inner is None else inner


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
