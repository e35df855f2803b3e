"""group_norm_silu and its gradient on the kernels of csrc/cpu."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import format_of
from ..dispatch import checks
from ..dispatch.backend import requested
from ..rows import picked_row
from . import library
from .library import DTYPES

# Elements of contiguous images from which the kernels are faster than PyTorch's own, which are good
# there: without and with a gradient. In channels_last the kernels always are.
LEAST, LEAST_WITH_GRADIENT = 2**14, 2**20


def slower(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *rest: Any) -> list[str]:
    """Why "auto" leaves a call to PyTorch."""
    if format_of(x) == torch.channels_last or requested("group_norm_silu") != "auto":
        return []
    tensors = (value for value in rest if isinstance(value, Tensor))
    least = LEAST_WITH_GRADIENT if checks.needs_gradient(x, weight, bias, *tensors) else LEAST
    return [f"fewer than {least:,} elements, not in channels_last"] if x.numel() < least else []


# ``GroupNorm`` of csrc/cpu/group_norm.h.
_ARGUMENTS = struct.Struct("@8P 3q 5q d 4i 8P")


def _run(
    x: Tensor,
    x2: Tensor | None,
    last: bool,
    num_groups: int,
    eps: float,
    silu: bool,
    vectors: tuple[Tensor | None, ...],
    y: Tensor | None = None,
    gradients: tuple[Tensor | None, ...] = (None,) * 8,
) -> None:
    """Call the kernel.

    Args:
        x, x2: the image, without gaps.
        last: whether its channels are innermost.
        num_groups, eps, silu: as in :func:`~diffusion_fast.ops.group_norm_silu`.
        vectors: weight, bias [C], add, scale and shift [B or 1, C].
        y: what the norm writes.
        gradients: grad, like ``y``; dx and dx2, like ``x`` and ``x2``; and float32 sums of the five
            vectors' gradients. All but the first are written.
    """
    vectors = tuple([v if v is None else v.float().contiguous() for v in vectors])
    tensors = (x, x2, y, *vectors, *gradients)
    pointers = [0 if value is None else value.data_ptr() for value in tensors]
    arguments = _ARGUMENTS.pack(
        *pointers[:8],
        *[0 if value is None or len(value) == 1 else value.stride(0) for value in vectors[2:]],
        *(x.shape[0], x.shape[1], 0 if x2 is None else x2.shape[1]),
        *(math.prod(x.shape[2:]), num_groups),
        eps,
        *(DTYPES[x.dtype], last, silu, torch.get_num_threads()),
        *pointers[8:],
    )
    if library.kernels.group_norm_silu(arguments):
        raise MemoryError(library.NO_MEMORY)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """[B, C, ...], in the memory format of ``x``."""
    if row is not None:
        picked = (v if v is None else picked_row(v, row) for v in (add, scale, shift))
        add, scale, shift = picked
    layout = format_of(x)
    x = x.contiguous(memory_format=layout)
    x2 = None if x2 is None else x2.contiguous(memory_format=layout)
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    vectors, last = (weight, bias, add, scale, shift), layout == torch.channels_last
    _run(x, x2, last, num_groups, eps, silu, vectors, y)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
) -> tuple[Any, ...]:
    """Gradients of x, weight, bias, add, scale, shift and x2; empty for one that is None."""
    layout, layout2 = format_of(x), format_of(x if x2 is None else x2)
    x = x.contiguous(memory_format=layout)
    x2 = None if x2 is None else x2.contiguous(memory_format=layout)
    vectors, last = (weight, bias, add, scale, shift), layout == torch.channels_last
    dx, dx2 = torch.empty_like(x), None if x2 is None else torch.empty_like(x2)
    sums = [
        None
        if value is None
        else x.new_empty((len(x), len(weight))[value.dim() == 1 :], dtype=torch.float32)
        for value in vectors
    ]
    gradients = (grad.contiguous(memory_format=layout), dx, dx2, *sums)
    _run(x, x2, last, num_groups, eps, silu, vectors, gradients=gradients)
    empty = x.new_empty(0)
    found = (empty if one is None else one.to(x.dtype) for one in sums)
    second = empty if dx2 is None else dx2.contiguous(memory_format=layout2)
    return dx, *found, second
