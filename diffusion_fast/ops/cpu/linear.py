"""Linear layers on the kernel of csrc/cpu, in float32: bias, gate and residual in its epilogue."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library

LINE = 16  # columns of a packed weight are filled up to a multiple of it

# ``Linear`` of csrc/cpu/linear.h.
_ARGUMENTS = struct.Struct("@5P 3q 2i")


def lines(columns: int) -> int:
    """The number with the last line filled up."""
    return -(-columns // LINE) * LINE


def packed_size(weight: Tensor, geglu: bool) -> list[int]:
    """Of what :func:`pack` makes of a weight."""
    out, inner = weight.shape
    return [1 + geglu, lines(out // (1 + geglu)), inner]


def pack(weight: Tensor, _: int, geglu: bool) -> tuple[Tensor]:
    """A weight [N, K] as the kernel reads it, [1 or with ``geglu`` 2, N', K], N' whole lines."""
    out, inner = weight.shape
    weight = weight.detach().contiguous()
    packed = weight.new_empty(packed_size(weight, geglu))
    library.kernels.linear_pack(
        *(ctypes.c_void_p(one.data_ptr()) for one in (weight, packed)),
        *(ctypes.c_int64(out), ctypes.c_int64(inner)),
        *(ctypes.c_int32(geglu), ctypes.c_int32(torch.get_num_threads())),
    )
    return (packed,)


def is_packed(packed: Sequence[Tensor]) -> bool:
    """Whether a packed weight is laid out for a kernel of csrc/cpu."""
    return len(packed) == 1 and not packed[0].is_mkldnn and packed[0].dim() == 3


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    mean: Tensor | None,
    rstd: Tensor | None,
    sums: Tensor | None,
    packed: Sequence[Tensor],
) -> list[str]:
    """Why this call is not for the kernel; empty if it is."""
    if weight.dtype != torch.float32:
        return [f"dtype {weight.dtype}"]
    if mean is not None:
        return ["a LayerNorm is folded into it"]
    return [] if packed and is_packed(packed) else ["its weight is not packed for it"]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    mean: Any,
    rstd: Any,
    sums: Any,
    packed: Sequence[Tensor],
) -> Tensor:
    """[..., N], with ``geglu`` [..., N / 2]."""
    out, inner = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out // (1 + geglu))
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    rows = x.numel() // inner
    arguments = _ARGUMENTS.pack(
        *(0 if one is None else one.data_ptr() for one in (x, packed[0], y, bias, residual)),
        *(rows, inner, out, geglu, torch.get_num_threads()),
    )
    if library.kernels.linear(arguments):
        raise MemoryError(library.NO_MEMORY)
    return y
