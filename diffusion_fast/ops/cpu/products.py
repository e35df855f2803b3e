"""The kinds of linear layers and convolutions that contests are about, and a call of each.

In float32, without a gradient; convolutions in channels_last. What takes but a moment is left to
the defaults.
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
    """The same of a call of ``linear``."""
    if mean is not None:
        return None
    return linear_kind(weight, math.prod(x.shape[:-1]), geglu)


def linear_example(rows: int, inner: int, out: int, geglu: bool) -> tuple[Any, ...]:
    """A call of this kind, with a bias and, where nothing is gated, a residual."""
    rows = min(rows, max(1, MOST // (inner * out)))
    x, weight = torch.full((rows, inner), 0.5), torch.full((out, inner), 0.5)
    residual = None if geglu else torch.full((rows, out), 0.5)
    return x, weight, torch.full((out,), 0.5), residual, geglu, None, None, None, ()


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
    weight = torch.full((out, channels, rows, columns), 0.5)
    residual = _image(batch, out, *_after((height, width), (rows, columns), stride, pads))
    return x, weight, torch.full((out,), 0.5), stride, list(pads), None, None, residual, ()


def _image(*size: int) -> Tensor:
    return torch.full(size, 0.5).contiguous(memory_format=torch.channels_last)
