"""oneDNN's products on a CPU, with epilogues and packed weights: the one file that calls them.

PyTorch's own F.linear goes to its BLAS, which on many CPUs is slower, and its convolutions reorder
their weights at every call. The operators under ``torch.ops.mkldnn`` are those that Inductor emits.
They record no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Multiply-adds below which oneDNN's set-up costs more than its products save.
SMALL = 2**21
TOO_SMALL = f"fewer than {SMALL:,} multiply-adds"

Packed = tuple[Tensor, ...]  # weights laid out as products read them best, once for many calls
_ONE = (1, 1)


@functools.cache
def machine() -> list[str]:
    """Why oneDNN can't run on this machine; empty if it can."""
    if not torch.backends.mkldnn.is_available():
        return ["this PyTorch was built without oneDNN"]
    names = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    absent = (name for name in names if not hasattr(torch.ops.mkldnn, name))
    return [f"this PyTorch has no torch.ops.mkldnn.{name}" for name in absent]


@functools.cache
def supports(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and takes tensors of this type of device and this dtype."""
    if machine() or device != "cpu":
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def takes(x: Tensor) -> list[str]:
    """Why oneDNN can't take a tensor, whatever the op; empty if it can."""
    return [] if supports(x.device.type, x.dtype) else [f"{x.dtype} on {x.device}"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    post: str = "none",
    other: Tensor | None = None,
) -> Tensor:
    """x W^T + bias, then ``post``: ``"gelu"`` (exact), or ``"add"`` or ``"mul"`` of ``other``."""
    bias = None if bias is None else bias.contiguous()  # whose strides oneDNN's operators ignore
    if other is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, post)
    post = post if post == "gelu" else "none"
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], "none")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pads: Sequence[int], other: Any
) -> Tensor:
    """The convolution plus ``other``, which may be None; pads are left, right, top, bottom."""
    bias = None if bias is None else bias.contiguous()  # as above
    left, right, top, bottom = pads
    if (left, top) != (right, bottom):
        x, left, top = F.pad(x, tuple(pads)), 0, 0
    sizes = [top, left], (stride, stride), _ONE, 1
    # What PyTorch 2.11 can't add itself: it takes such a tensor for one in another layout.
    alike = other is not None and (other.shape[1] == 1 or other.shape[2:] == (1, 1))
    if other is None or alike:
        y = torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *sizes, "none", [], "")
        return y.add_(other) if alike else y
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, other, weight, bias, *sizes, "add", 1.0, None, [], None
    )


def pack_linear(weight: Tensor, rows: int, geglu: bool) -> Packed:
    """A weight [N, K] for x of so many rows; with ``geglu`` both halves, each for itself."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    parts = weight.detach().chunk(2) if geglu else (weight.detach(),)
    return tuple(reorder(part.contiguous(), rows) for part in parts)


def pack_conv2d(
    weight: Tensor, size: Sequence[int], stride: int, pads: Sequence[int]
) -> tuple[Tensor]:
    """A weight [O, C, kh, kw] for an input of a size [B, C, H, W] with those zeros around it."""
    (batch, channels, height, width), (left, right, top, bottom) = size, pads
    even = [top, left]
    if (left, top) != (right, bottom):  # then :func:`conv2d` puts them into the input
        height, width, even = height + top + bottom, width + left + right, [0, 0]
    reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight
    plain, size = weight.detach().contiguous().to_mkldnn(), [batch, channels, height, width]
    return (reorder(plain, even, (stride, stride), _ONE, 1, size),)
