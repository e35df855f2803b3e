"""The kinds of linear layers and convolutions that contests are about, and a call of each.

In float32; convolutions in channels_last. What takes but a moment is left to the defaults.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import format_of
from ..onednn import supports
from .contest import Kind

LEAST = 2**14  # multiply-adds: a microsecond
MOST = 2**33  # of a made-up call: a tenth of a second or two; larger ones are as this much of them


@functools.cache
def _measured(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and supports("cpu", dtype)


def linear_kind(weight: Tensor, rows: int, geglu: bool) -> Kind | None:
    """The kind of a product of x [rows, K] and a weight [N, K]; None where none is measured."""
    if not _measured(weight.dtype) or rows * weight.numel() < LEAST:
        return None
    return rows, weight.shape[1], weight.shape[0], geglu


def linear_kind_of(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, geglu: bool, mean: Any, *_: Any
) -> Kind | None:
    """The same of a call of ``linear``; the products of a gradient read x or weight by columns."""
    if mean is not None:
        return None
    kind = linear_kind(weight, math.prod(x.shape[:-1]), geglu)
    columns = _by_columns(x), _by_columns(weight)
    return (*kind, *columns) if kind is not None and any(columns) else kind


def _by_columns(matrix: Tensor) -> bool:
    return matrix.dim() == 2 and matrix.stride(0) == 1 != matrix.stride(1)


def linear_example(
    rows: int, inner: int, out: int, geglu: bool, x_columns: bool = False, columns: bool = False
) -> tuple[Any, ...]:
    """A call of this kind, with a bias and, where nothing is gated, a residual.

    Products of a gradient, where x or the weight is read by columns, have neither.
    """
    rows = min(rows, max(1, MOST // (inner * out)))
    x, weight = (
        _filled(inner, count).mT if turned else _filled(count, inner)
        for count, turned in ((rows, x_columns), (out, columns))
    )
    plain = not (x_columns or columns)
    bias = _filled(out) if plain else None
    residual = _filled(rows, out) if plain and not geglu else None
    return x, weight, bias, residual, geglu, None, None, None, ()


def conv2d_kind(
    weight: Tensor, size: Sequence[int], stride: int, pads: Sequence[int]
) -> Kind | None:
    """The kind of a convolution of [B, C, H, W] = ``size``; None where none is measured."""
    out, _, *window = weight.shape
    small = size[0] * math.prod(_after(size[2:], window, stride, pads)) * weight.numel() < LEAST
    if not _measured(weight.dtype) or window == [1, 1] or small:
        return None
    return (*size, out, *window, stride, *pads)


def _after(
    size: Sequence[int], window: Sequence[int], stride: int, pads: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the result."""
    left, right, top, bottom = pads
    height, width = size[0] + top + bottom, size[1] + left + right
    return (height - window[0]) // stride + 1, (width - window[1]) // stride + 1


def conv2d_kind_of(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: int,
    pads: Sequence[int],
    x2: Any,
    add: Any,
    residual: Any,
    _: Any,
) -> Kind | None:
    """The same of a call of ``conv2d``."""
    if format_of(x, weight) != torch.channels_last:
        return None
    return conv2d_kind(weight, (len(x), weight.shape[1], *x.shape[2:]), stride, pads)


def conv2d_example(
    batch: int,
    channels: int,
    height: int,
    width: int,
    out: int,
    rows: int,
    columns: int,
    stride: int,
    *pads: int,
) -> tuple[Any, ...]:
    """A call of this kind, with a bias and a residual."""
    line = batch * channels * width * out * rows * columns
    height = min(height, max(rows, MOST * stride**2 // line))
    x = _image(batch, channels, height, width)
    weight = _filled(out, channels, rows, columns)
    residual = _image(batch, out, *_after((height, width), (rows, columns), stride, pads))
    return x, weight, _filled(out), stride, list(pads), None, None, residual, ()


def conv2d_backward_kind_of(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, pads: Sequence[int], needs: Sequence[bool]
) -> Kind | None:
    """The same of a call of ``conv2d_backward``: the convolution, and what of it is trained."""
    if format_of(x, weight) != torch.channels_last:
        return None
    kind = conv2d_kind(weight, x.shape, stride, pads)
    winograd = weight.shape[2:] == (3, 3) and stride == 1
    return None if kind is None or not winograd else (*map(bool, needs[:2]), *kind)


def conv2d_backward_example(by_x: bool, by_weight: bool, *kind: Any) -> tuple[Any, ...]:
    """A call of this kind."""
    x, weight, _, stride, pads, _, _, y, _ = conv2d_example(*kind)
    return y, x, weight, stride, pads, [by_x, by_weight, by_weight]


def _image(*size: int) -> Tensor:
    return _filled(*size).contiguous(memory_format=torch.channels_last)


def _filled(*size: int) -> Tensor:
    return torch.full(size, 0.5, dtype=torch.float32, device="cpu")
