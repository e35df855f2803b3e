"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) on the kernel of csrc/cpu, in float32.

16 products take the place of 36 (Lavin & Gray 2015). A number that is not finite in the input makes
NaN of its whole tile of 2x2.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import format_of
from . import library
from .linear import LINE, is_packed

_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_LAST = torch.channels_last

# ``Winograd`` of csrc/cpu/winograd.h.
_ARGUMENTS = struct.Struct("@6P 10q i")


def fits(weight: Tensor, stride: int) -> list[str]:
    """Why the algorithm can't take a weight [O, C, kh, kw]; empty if it can."""
    if weight.dtype != torch.float32:
        return [f"dtype {weight.dtype}"]
    if weight.shape[2:] != (3, 3) or stride != 1:
        return ["Winograd's algorithm is for windows of 3x3 and stride 1"]
    return []


def pack(weight: Tensor, **_: Any) -> tuple[Tensor]:
    """G g G^T of a weight [O, C, 3, 3] as the kernel reads it, [16, C, O'], O' whole lines."""
    out, channels = weight.shape[:2]
    weight = weight.detach().contiguous()
    packed = torch.empty(16, channels, -(-out // LINE) * LINE)
    pointers = (_POINTER(one.data_ptr()) for one in (weight, packed))
    library.kernels.winograd_pack(
        *pointers, _INT(out), _INT(channels), _FLAG(torch.get_num_threads())
    )
    return (packed,)


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    pads: Sequence[int],
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Sequence[Tensor],
) -> list[str]:
    """Why this call is not for the kernel; empty if it is."""
    why = fits(weight, stride)
    return why or ([] if is_packed(packed) else ["its weight is not packed for it"])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    pads: Sequence[int],
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    """[B, O, H', W'], computed in channels_last."""
    form = format_of(x, weight)
    x = (x if x2 is None else torch.cat((x, x2), 1)).contiguous(memory_format=_LAST)
    (left, right, top, bottom), out = pads, weight.shape[0]
    batch, channels, height, width = x.shape
    size = batch, out, height + top + bottom - 2, width + left + right - 2
    y = torch.empty(size, memory_format=_LAST)
    if residual is not None:
        residual = residual.contiguous(memory_format=_LAST)
    if bias is not None:
        bias = bias.contiguous()
    if add is not None:
        add = add if add.stride(1) == 1 else add.contiguous()
    arguments = _ARGUMENTS.pack(
        *(0 if one is None else one.data_ptr() for one in (x, packed[0], y, bias, add, residual)),
        0 if add is None else add.stride(0),
        *(batch, height, width, channels, *size[2:], out, left, top, torch.get_num_threads()),
    )
    library.kernels.winograd(arguments)
    return y.contiguous(memory_format=form)
