"""oneDNN's products on a CPU, with epilogues and packed weights: the one file that calls them.

PyTorch's own F.linear goes to its BLAS, which on many CPUs is slower, and its convolutions reorder
their weights at every call. The operators under ``torch.ops.mkldnn`` are those that Inductor emits.
They record no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

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
    if other is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, post)
    post = post if post == "gelu" else "none"
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], "none")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int], other: Any
) -> Tensor:
    """The convolution plus ``other``, which may be None."""
    sizes = padding, (stride, stride), _ONE, 1
    # What PyTorch 2.11 can't add itself: it takes such a tensor for one in another layout.
    alike = other is not None and (other.shape[1] == 1 or other.shape[2:] == (1, 1))
    if other is None or alike:
        y = torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *sizes, "none", [], "")
        return y.add_(other) if alike else y
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, other, weight, bias, *sizes, "add", 1.0, None, [], None
    )


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def pack_conv2d(weight: Tensor, size: tuple[int, ...], stride: int, padding: list[int]) -> Tensor:
    packed = weight.detach().contiguous().to_mkldnn()
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(
        packed, padding, (stride, stride), _ONE, 1, list(size)
    )
