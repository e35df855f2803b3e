r"""Linear layers and convolutions in int8 on a CPU: lossy, and about twice to four times as fast.

Weights are rounded once, :math:`w \approx s_n k` with an integer k of -127 to 127 and a scale for
each output. Inputs are rounded at every call, :math:`x \approx s (q - z)` with q of 0 to 255, and
with a scale and a zero point for each item of the batch, so that no item depends on the others.
Then

.. math:: x W^T \approx s\,s_n \sum_k (q - z)\,k

whose sum is exact in int32 on VNNI. The operators are those that Inductor emits for models
quantized by PyTorch (``torch.ops.onednn.qlinear_pointwise``, ``qconv_pointwise``). They take and
give float32 here, and record no gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hardware import cpu_flags
from ..kernels.layout import format_of
from .onednn import Packed

VNNI = ("avx512_vnni", "avx_vnni")  # as Linux names them; without them products of 8 bits saturate
OPERATORS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv_pointwise")
LARGEST = 127  # of a weight
STEPS = 254  # from the least to the largest number of an input; one of 255 is for the zero point
LEAST = 1e-30  # of a scale, so that 1 / scale is finite in float32
# A float32 of this size has no bits below 1: adding it rounds to an integer, which the lowest bits
# of the sum then hold.
ROUNDING = 1.5 * 2.0**23
_ONE = [1, 1]


@functools.cache
def machine() -> list[str]:
    """Why this machine can't; empty if it can."""
    absent = [name for name in OPERATORS if not hasattr(torch.ops.onednn, name)]
    if not torch.backends.mkldnn.is_available() or absent:
        what = f"torch.ops.onednn.{absent[0]}" if absent else "oneDNN"
        return [f"this PyTorch has no {what}"]
    return [] if cpu_flags().intersection(VNNI) else ["this CPU has no VNNI"]


def supports(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why a model of this dtype on this device can't have its products in int8."""
    if device.type != "cpu":
        return [f"a model on {device}"]
    return [f"a model in {dtype}"] if dtype != torch.float32 else machine()


def rounded_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, ...] as int8 of -127 to 127, and the scale of each output, float32 [N]."""
    scales = (weight.detach().flatten(1).abs().amax(1) / LARGEST).clamp_min(LEAST)
    of_output = scales.view(-1, *[1] * (weight.dim() - 1))
    return (weight.detach() / of_output).round().to(torch.int8), scales


def rounded(x: Tensor) -> tuple[Tensor, float, int]:
    """An input as uint8 q with x ~ scale (q - zero); where x isn't finite the scale is NaN.

    Zero, and so a convolution's padding, is exact. The scale is that of 254 steps over the range of
    x, and zero rounded up, so that no q leaves its 8 bits.
    """
    low, high = (value.item() for value in torch.aminmax(x))
    if not math.isfinite(high - low):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / STEPS, LEAST)
    zero = math.ceil(-low / scale)
    q = torch.add(
        torch.tensor(ROUNDING + zero, dtype=torch.float32, device=x.device), x, alpha=1 / scale
    )
    return q.view(torch.int32).to(torch.uint8), scale, zero


def pack_linear(weight: Tensor, rows: int, *, geglu: bool = False) -> Packed | None:
    """What :func:`linear` reads of a float32 weight [N, K]: a quarter of its memory.

    ``rows`` is what :func:`diffusion_fast.ops.pack_linear` is told, and makes no difference here.

    Returns:
        Scales, zeros, and for each half of a gate, or for all, the packed weight; None on the meta
        device.
    """
    if weight.is_meta:
        return None
    whole, scales = rounded_weight(weight)
    parts = whole.chunk(2) if geglu else (whole,)
    # It reads memory in the order of a contiguous [N, K], whatever the strides are.
    packed = (torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in parts)
    return (scales, torch.zeros_like(scales, dtype=torch.int64), *packed)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    packed: Sequence[Tensor] | None,
    residual: Tensor | None = None,
    geglu: bool = False,
    norm: None = None,
) -> Tensor:
    """As :func:`diffusion_fast.ops.linear`, with weight and input rounded to 8 bits.

    Args:
        x: [B, ..., K]; each item of the batch has a scale of its own.
        weight: [N, K]; of it the shape counts.
        packed: of :func:`pack_linear`, for the same ``geglu``.
        bias, residual, geglu: as there. No layer norm is folded in.

    Returns:
        [B, ..., N], or [B, ..., N / 2] with ``geglu``, in the dtype of x.
    """
    y = x.new_empty((*x.shape[:-1], len(weight) // (1 + geglu)))
    if packed is None:  # on the meta device
        return y
    scales, zeros, *weights = packed
    parts = len(weights)
    biases = (None,) * parts if bias is None else bias.float().chunk(parts)
    each = list(zip(weights, scales.chunk(parts), zeros.chunk(parts), biases, strict=True))
    for i, item in enumerate(x.float()):
        inputs = rounded(item)
        value = _product(inputs, each[0])
        if geglu:
            value.mul_(_product(inputs, each[1], "gelu"))
        _write(y[i], value, residual if residual is None else residual[i])
    return y


def _product(
    inputs: tuple[Tensor, float, int], layer: tuple[Any, ...], post: str = "none"
) -> Tensor:
    """Inputs of :func:`rounded` times a layer (weight, scales, zeros, bias), then ``post``."""
    result = 1.0, 0, torch.float32  # its scale, zero and dtype
    return torch.ops.onednn.qlinear_pointwise(*inputs, *layer, *result, post, [], "none")


def _write(y: Tensor, value: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        y.copy_(value)
    else:
        torch.add(value, residual, out=y)


def pack_conv2d(
    weight: Tensor, size: Sequence[int], *, stride: int = 1, padding: int = 0
) -> Packed | None:
    """What :func:`conv2d` reads of a float32 weight [O, C, kh, kw]: a quarter of its memory.

    Args:
        weight: the weight.
        size: the input's [B, C, H, W]; others work as well, perhaps slower.
        stride, padding: as in :func:`conv2d`.

    Returns:
        Scales, zeros and the packed weight; None on the meta device.
    """
    if weight.is_meta:
        return None
    whole, scales = rounded_weight(weight)
    window = [stride] * 2, [padding] * 2, _ONE, 1
    # The input's own scale and zero point are told at each call; here a zero that isn't 0 says that
    # there will be one.
    packed = torch.ops.onednn.qconv_prepack(whole, scales, 1.0, 1, *window, [1, *size[1:]])
    return scales, torch.zeros_like(scales, dtype=torch.int64), packed


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    packed: Sequence[Tensor] | None,
    stride: int = 1,
    padding: int = 0,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`diffusion_fast.ops.conv2d`, with weight and input rounded to 8 bits.

    Args:
        x, x2: [B, C1, H, W] and [B, C2, H, W]; each item of the batch has one scale.
        weight: [O, C1 + C2, kh, kw]; of it the shape counts.
        packed: of :func:`pack_conv2d`.
        stride, padding: one number for both dimensions and all sides.
        bias, add, residual: as there.

    Returns:
        [B, O, H', W'] in the dtype of x.
    """
    form = format_of(x, weight)
    x = x if x2 is None else torch.cat((x, x2), 1)
    sides = ((x.shape[i] + 2 * padding - weight.shape[i]) // stride + 1 for i in (2, 3))
    size = len(x), len(weight), *sides
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)
    if packed is None:  # on the meta device
        return y
    scales, zeros, whole = packed
    window = [stride] * 2, [padding] * 2, _ONE, 1
    result = 1.0, 0, torch.float32  # its scale, zero and dtype
    for i, item in enumerate(x.float().split(1)):
        own = bias if add is None else add[i] if bias is None else bias + add[i]
        layer = whole, scales, zeros, own if own is None else own.float()
        value = torch.ops.onednn.qconv_pointwise(
            *rounded(item), *layer, *window, *result, "none", [], ""
        )
        _write(y[i : i + 1], value, residual if residual is None else residual[i : i + 1])
    return y
