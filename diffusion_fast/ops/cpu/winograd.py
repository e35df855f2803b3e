"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) on the kernel of csrc/cpu, in float32.

16 products take the place of 36 (Lavin & Gray 2015), in both gradients as well. A number that is
not finite in the input makes NaN of its whole tile of 2x2.
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
from .linear import LINE, is_packed, lines

_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_LAST = torch.channels_last

# ``Winograd`` and ``WinogradGradient`` of csrc/cpu/winograd.h.
_ARGUMENTS = struct.Struct("@6P 13q i")
_OF_GRADIENT = struct.Struct("@3P 12q i")


def fits(weight: Tensor, stride: int) -> list[str]:
    """Why the algorithm can't take a weight [O, C, kh, kw]; empty if it can."""
    if weight.dtype != torch.float32:
        return [f"dtype {weight.dtype}"]
    if weight.shape[2:] != (3, 3) or stride != 1:
        return ["Winograd's algorithm is for windows of 3x3 and stride 1"]
    return []


def packed_size(weight: Tensor) -> tuple[int, ...]:
    """Of what :func:`pack` makes of a weight [O, C, 3, 3]; () for another window."""
    out, channels, *window = weight.shape
    return (16, channels, lines(out)) if window == [3, 3] else ()


def pack(weight: Tensor, **_: Any) -> tuple[Tensor]:
    """G g G^T of a weight [O, C, 3, 3] as the kernel reads it, [16, C, O'], O' whole lines.

    A line lies between its planes, which would share the cache's sets.
    """
    weight, strides = _dense(weight.detach())
    out, channels = weight.shape[:2]
    padded = lines(out)
    planes = weight.new_empty(16, channels * padded + LINE)
    library.kernels.winograd_pack(
        *(_POINTER(one.data_ptr()) for one in (weight, planes)),
        *(_INT(one) for one in (out, channels, *strides)),
        _FLAG(torch.get_num_threads()),
    )
    return (planes[:, :-LINE].view(16, channels, padded),)


Strides = tuple[int, int, int]  # of a weight's outputs, channels, and places in the window
_PACKED: Strides = (0, 0, 0)


def _dense(weight: Tensor) -> tuple[Tensor, Strides]:
    """A weight in one of two layouts, and its strides."""
    form, channels = format_of(weight), weight.shape[1]
    strides = (9 * channels, 1, channels) if form == _LAST else (9 * channels, 9, 1)
    return weight.contiguous(memory_format=form), strides


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
    return fits(weight, stride)


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
    """[B, O, H', W'], computed in channels_last; a weight that is not packed is transformed."""
    both, out = x if x2 is None else torch.cat((x, x2), 1), weight.shape[0]
    if is_packed(packed):
        y = _convolved(both, packed[0].data_ptr(), _PACKED, out, pads, bias, add, residual)
    else:
        weight, strides = _dense(weight)
        y = _convolved(both, weight.data_ptr(), strides, out, pads, bias, add, residual)
    return y.contiguous(memory_format=format_of(x, weight))


def _convolved(
    x: Tensor,
    weight: int,
    strides: Strides,
    out: int,
    pads: Sequence[int],
    bias: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution with a weight at an address and what follows it, in channels_last."""
    x = x.contiguous(memory_format=_LAST)
    left, right, top, bottom = pads
    batch, channels, height, width = x.shape
    size = batch, out, height + top + bottom - 2, width + left + right - 2
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_LAST)
    if residual is not None:
        residual = residual.contiguous(memory_format=_LAST)
    if bias is not None:
        bias = bias.contiguous()
    if add is not None:
        add = add if add.stride(1) == 1 else add.contiguous()
    arguments = _ARGUMENTS.pack(
        *(x.data_ptr(), weight, y.data_ptr()),
        *(0 if one is None else one.data_ptr() for one in (bias, add, residual)),
        *(0 if add is None else add.stride(0), *strides),
        *(batch, height, width, channels, *size[2:], out, left, top, torch.get_num_threads()),
    )
    if library.kernels.winograd(arguments):
        raise MemoryError(library.NO_MEMORY)
    return y


def backward_supports(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    pads: Sequence[int],
    needs: Sequence[bool],
) -> list[str]:
    """Why these gradients are not for the kernels; empty if they are."""
    return library.first_order(grad, x, weight) or fits(weight, stride)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    pads: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, weight and bias; empty tensors for those that are not needed."""
    grad = grad.contiguous(memory_format=_LAST)
    dx, dweight, dbias = (grad.new_empty(0) for _ in range(3))
    if needs[0]:  # a convolution as well, with the weight's windows read backwards
        weight, (output, channel, window) = _dense(weight)
        end = weight.data_ptr() + 8 * window * weight.element_size()
        strides = channel, output, -window
        dx = _convolved(grad, end, strides, x.shape[1], [2 - pad for pad in pads])
        dx = dx.contiguous(memory_format=format_of(x, weight))
    if needs[1]:
        dweight = _by_weight(grad, x.contiguous(memory_format=_LAST), weight, pads)
    if needs[2]:
        dbias = grad.sum((0, 2, 3))
    return dx, dweight, dbias


def _by_weight(grad: Tensor, x: Tensor, weight: Tensor, pads: Sequence[int]) -> Tensor:
    """The weight's gradient, laid out as the weight; both images are in channels_last."""
    dweight, strides = _dense(torch.empty_like(weight, memory_format=format_of(weight)))
    left, _, top, _ = pads
    batch, channels, height, width = x.shape
    arguments = _OF_GRADIENT.pack(
        *(one.data_ptr() for one in (x, grad, dweight)),
        *(*strides, batch, height, width, channels, *grad.shape[2:], len(weight), left, top),
        torch.get_num_threads(),
    )
    if library.kernels.winograd_gradient(arguments):
        raise MemoryError(library.NO_MEMORY)
    return dweight
