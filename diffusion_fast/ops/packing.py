"""Weights laid out as a device's products read them best, made once for many calls."""

from __future__ import annotations

import torch
from torch import Tensor

from . import onednn
from .conv2d import Padding, pads_of
from .dispatch import checks

Packed = tuple[Tensor, ...]


def pack_linear(weight: Tensor, rows: int, *, geglu: bool = False) -> Packed | None:
    """What :func:`linear` takes as ``packed``, in a layout of its own: a copy of the weight.

    Args:
        weight: [N, K].
        rows: how many rows ``x`` will have, all its dimensions but the last; others work as well,
            perhaps slower.
        geglu: whether the packed weight is for calls with ``geglu=True``, and for those only.

    Returns:
        None where packing does nothing: off the CPU, without oneDNN, or for the weight's dtype.

    Raises:
        ValueError: not a floating [N, K], an odd N with ``geglu``, or rows below 1.
    """
    checks.floating("weight", weight)
    checks.positive_int("rows", rows)
    if weight.dim() != 2 or (geglu and weight.shape[0] % 2):
        checks.fail("weight", "shape [N, K], N even with geglu", list(weight.shape))
    if not onednn.supports(weight):
        return None
    parts = weight.chunk(2) if geglu else (weight,)
    return tuple(onednn.pack_linear(part, rows) for part in parts)


def pack_conv2d(
    weight: Tensor, size: tuple[int, int, int, int], *, stride: int = 1, padding: Padding = 0
) -> Packed | None:
    """What :func:`conv2d` takes as ``packed``, in a layout of its own: a copy of the weight.

    Args:
        weight: [O, C, kh, kw].
        size: the input's [B, C, H, W], both sources counted; others work as well, perhaps slower.
        stride, padding: as in :func:`conv2d`.

    Returns:
        None where packing does nothing: a 1x1 window, whose weight is read as it is, or a CPU
        without oneDNN. On CUDA it is the weight in channels_last.

    Raises:
        ValueError: not a floating [O, C, kh, kw], or a size that doesn't fit it.
    """
    checks.floating("weight", weight)
    checks.positive_int("stride", stride)
    left, right, top, bottom = pads_of(padding)
    if weight.dim() != 4:
        checks.fail("weight", "shape [O, C, kh, kw]", list(weight.shape))
    if len(size) != 4 or size[1] != weight.shape[1]:
        checks.fail("size", f"[B, C, H, W] with C = {weight.shape[1]}", list(size))
    if weight.shape[2:] == (1, 1):
        return None
    if weight.device.type == "cuda":
        return (weight.detach().contiguous(memory_format=torch.channels_last),)
    if not onednn.supports(weight):
        return None
    batch, channels, height, width = size
    pads = [top, left]
    if (left, top) != (right, bottom):  # then conv2d pads the input itself
        height, width, pads = height + top + bottom, width + left + right, [0, 0]
    return (onednn.pack_conv2d(weight, (batch, channels, height, width), stride, pads),)
