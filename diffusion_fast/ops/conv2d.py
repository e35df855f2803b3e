"""A convolution with its neighbours: a second source, bias, time embedding, residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.layout import format_of
from . import onednn
from .cpu import library as cpu
from .cpu import products, winograd
from .cpu.contest import Contest, Ways, packed_call
from .dispatch import Backend, Op, autocast, checks, needs_gradient, triton
from .dispatch.backend import requested

Padding = int | tuple[int, int, int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    packed: Sequence[Tensor] | None = None,
) -> Tensor:
    """conv(cat(x, x2)) + bias + add + residual, without the concatenation where a kernel can.

    Args:
        x: [B, C1, H, W].
        weight: [O, C1 + C2, kh, kw].
        bias: [O]; None adds nothing.
        stride: step of the window in both dimensions.
        padding: zeros on every side, or (left, right, top, bottom).
        x2: [B, C2, H, W], further input channels behind those of ``x``; None: C2 is 0.
        add: [B, O], one number per image and channel (time embedding).
        residual: what is added to the result, of its shape.
        packed: what :func:`pack_conv2d` made of ``weight``; it changes the speed, not the result.

    Under autocast the tensors are cast to its dtype, as F.conv2d casts them.

    Returns:
        [B, O, H', W']; channels_last if ``x`` is or the weight is, else contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, a stride below 1, a negative
            padding, or an image smaller than the window.

    Examples:
        >>> x, weight = torch.randn(1, 4, 8, 8), torch.randn(16, 4, 3, 3)
        >>> df.ops.conv2d(x, weight, stride=2, padding=(0, 1, 0, 1)).shape
        torch.Size([1, 16, 4, 4])
    """
    pads = padding if isinstance(padding, (list, tuple)) else (padding,) * 4
    return _OP(x, weight, bias, stride, pads, x2, add, residual, packed or ())


def _cast(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: int,
    pads: list[int],
    x2: Any,
    add: Any,
    residual: Any,
    packed: Any,
) -> autocast.Policy:
    own = weight.dtype
    x, weight, bias, x2, add, residual = autocast.cast(x.device, x, weight, bias, x2, add, residual)
    packed = packed if weight.dtype == own else ()  # it holds the weight as it was
    return (x, weight, bias, stride, pads, x2, add, residual, packed), None


def window(stride: Any, padding: Any) -> list[int]:
    """Check how a window moves, and give the padding [left, right, top, bottom] of F.pad."""
    pads = list(padding) if isinstance(padding, (list, tuple)) else [padding] * 4
    whole = all(type(number) is int and number >= 0 for number in (stride, *pads))
    if whole and stride and len(pads) == 4:
        return pads
    checks.positive_int("stride", stride)
    expected = "an integer of at least 0, or four of them"
    if len(pads) != 4:
        checks.fail("padding", expected, padding)
    return [checks.whole("padding", pad, expected) for pad in pads]


def _check(
    x: Any,
    weight: Any,
    bias: Any,
    stride: int,
    pads: list[int],
    x2: Any,
    add: Any,
    residual: Any,
    packed: Any,
) -> None:
    checks.together({"x": x, "weight": weight}, bias=bias, x2=x2, add=add, residual=residual)
    if x.dim() != 4:
        checks.fail("x", "shape [B, C, H, W]", list(x.shape))
    window(stride, pads)
    batch, channels, height, width = x.shape
    if x2 is not None:
        if x2.dim() != 4:
            checks.fail("x2", "shape [B, C2, H, W]", list(x2.shape))
        checks.shape("x2", x2, (batch, x2.shape[1], height, width), "[B, C2, H, W]")
        channels += x2.shape[1]
    if weight.dim() != 4 or weight.shape[1] != channels:
        checks.fail("weight", f"shape [O, C, kh, kw] with C = {channels}", list(weight.shape))
    size = _output_size(x, weight, stride, pads)
    if size[2] < 1 or size[3] < 1:
        checks.fail("x", f"at least the window {list(weight.shape[2:])}", list(x.shape))
    checks.shapes(
        ("bias", bias, size[1:2], "[O]"),
        ("add", add, size[:2], "[B, O]"),
        ("residual", residual, size, "[B, O, H', W']"),
    )
    if packed:
        sizes = [list(one.shape) for one in packed]
        own = weight.shape if packed[0].dim() == 4 else winograd.packed_size(weight)
        if sizes != [list(own)]:
            checks.fail("packed", f"what is made of a weight {list(weight.shape)}", sizes)


def _output_size(
    x: Tensor, weight: Tensor, stride: int, pads: Sequence[int]
) -> tuple[int, int, int, int]:
    left, right, top, bottom = pads
    (batch, _, height, width), (out, _, rows, columns) = x.shape, weight.shape
    return (
        batch,
        out,
        (height + top + bottom - rows) // stride + 1,
        (width + left + right - columns) // stride + 1,
    )


def _joined(x: Tensor, x2: Tensor | None, pads: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Both sources as one tensor, and the padding [top, left] that is the same on both sides.

    Where it isn't, the zeros are in the tensor and the padding is 0.
    """
    if x2 is not None:
        x = torch.cat((x, x2), 1)
    left, right, top, bottom = pads
    if left == right and top == bottom:
        return x, [top, left]
    return F.pad(x, tuple(pads)), [0, 0]


def pack_conv2d(
    weight: Tensor, size: tuple[int, int, int, int], *, stride: int = 1, padding: Padding = 0
) -> onednn.Packed | None:
    """What :func:`conv2d` takes as ``packed``, in a layout of its own: a copy of the weight.

    On a CPU that is oneDNN's layout, or Winograd's transform of a 3x3 window (16/9 of the weight's
    memory) where an engine has measured that to be faster, or under ``use_backend(conv2d="cpu")``.

    Args:
        weight: [O, C, kh, kw].
        size: the input's [B, C, H, W], both sources counted; others work as well, perhaps slower.
        stride, padding: as in :func:`conv2d`.

    Returns:
        None where packing does nothing: a 1x1 window, whose weight is read as it is, a CPU without
        oneDNN, or one on which it was measured to gain nothing. On CUDA it is the weight in
        channels_last.

    Raises:
        ValueError: not a floating [O, C, kh, kw], or a size that doesn't fit it.

    Examples:
        >>> x, weight = torch.randn(1, 4, 8, 8), torch.randn(16, 4, 3, 3)
        >>> packed = df.ops.pack_conv2d(weight, (1, 4, 8, 8), padding=1)
        >>> y = df.ops.conv2d(x, weight, padding=1, packed=packed)
        >>> torch.allclose(y, df.ops.conv2d(x, weight, padding=1), atol=1e-4)
        True
    """
    return _packer(weight, size, stride, padding)(weight)


def _not_packed(*_: Any, **__: Any) -> None:
    """A weight is read as it is."""


UNPACKED = "winograd_unpacked"  # the way that transforms the weight at each call

# How a weight is laid out for each way of the contest.
_PACKERS: dict[str, Callable[..., onednn.Packed | None]] = {
    "packed": onednn.pack_conv2d,
    "winograd": winograd.pack,
    "direct": _not_packed,
    UNPACKED: _not_packed,
}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    form = format_of(x, weight)
    both, pads = _joined(x, x2, padding)
    if packed and not packed[0].is_mkldnn and packed[0].dim() == 4 and not needs_gradient(weight):
        weight = packed[0]  # as cuDNN reads it
    y = F.conv2d(both, weight, bias, stride, pads)
    if add is not None:
        y = y + add[..., None, None]
    if residual is not None:
        y = y + residual
    return y.contiguous(memory_format=form)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, stride: int, padding: Sequence[int], *_: Any
) -> Tensor:
    size = _output_size(x, weight, stride, padding)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=format_of(x, weight))


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients by x, weight and bias; empty tensors for those not needed."""
    both, pads = _joined(x, None, padding)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        *(grad, both, weight, [weight.shape[0]], [stride] * 2, pads, [1, 1], False, [0, 0], 1),
        needs,
    )
    if needs[0]:
        if both.shape[2:] != x.shape[2:]:
            left, _, top, _ = padding
            dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        dx = dx.contiguous(memory_format=format_of(x, weight))
    if needs[1]:
        dweight = dweight.contiguous(memory_format=format_of(weight))
    dx, dweight, dbias = (
        one if needed else grad.new_empty(0)
        for one, needed in zip((dx, dweight, dbias), needs, strict=True)
    )
    return dx, dweight, dbias


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Any, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    forms = format_of(x, weight), format_of(weight), torch.contiguous_format
    shapes = zip((x.shape, weight.shape, weight.shape[:1]), forms, needs, strict=True)
    return tuple(
        grad.new_empty(0)
        if not needed
        else torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=form)
        for shape, form, needed in shapes
    )


_OP = Op(
    "conv2d",
    reference,
    _fake,
    public=conv2d,
    check=_check,
    policy=_cast,
)
_BACKWARD = Op("conv2d_backward", reference_backward, _fake_backward)


@_OP.kept
def _packer(
    weight: Tensor, size: tuple[int, int, int, int], stride: int, padding: Padding
) -> Callable[[Tensor], onednn.Packed | None]:
    """What lays out weights like this one."""
    checks.floating("weight", weight)
    pads = window(stride, padding)
    if weight.dim() != 4:
        checks.fail("weight", "shape [O, C, kh, kw]", list(weight.shape))
    if len(size) != 4 or size[1] != weight.shape[1]:
        checks.fail("size", f"[B, C, H, W] with C = {weight.shape[1]}", list(size))
    if weight.device.type == "cuda" and weight.shape[2:] != (1, 1):
        return lambda weight: (weight.detach().contiguous(memory_format=torch.channels_last),)
    if weight.shape[2:] == (1, 1) or not onednn.supports(weight.device.type, weight.dtype):
        return _PACKERS["direct"]
    left, right, top, bottom = pads
    if size[2] + top + bottom < weight.shape[2] or size[3] + left + right < weight.shape[3]:
        checks.fail("size", f"at least the window {list(weight.shape[2:])}", list(size))
    asked, way = requested("conv2d"), "packed"
    if asked == cpu.NAME:
        way = "winograd"
    elif asked == "auto":
        kind = products.conv2d_kind(weight, size, stride, pads)
        way = next(iter(_CONTEST.order(kind)), way)
    if way == "winograd" and (winograd.fits(weight, stride) or cpu.settle()):
        way = "packed"
    return functools.partial(_PACKERS[way], size=size, stride=stride, pads=pads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.stride, ctx.padding, x2, _, _, packed = inputs
    ctx.no_packed = [None] * len(packed)
    ctx.save_for_backward(x, weight, x2)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, x2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    both = x if x2 is None else torch.cat((x, x2), 1)
    wanted = [needs[0] or needs[5], needs[1], needs[2]]
    backward = _BACKWARD if _has_kernels(grad) else reference_backward
    dboth, dweight, dbias = backward(grad, both, weight, ctx.stride, ctx.padding, wanted)
    dx, dx2 = (dboth, None) if x2 is None else (dboth[:, : x.shape[1]], dboth[:, x.shape[1] :])
    dadd = grad.sum((2, 3)) if needs[6] else None
    return (
        dx if needs[0] else None,
        dweight if needs[1] else None,
        dbias if needs[2] else None,
        None,
        None,
        dx2 if needs[5] else None,
        dadd,
        grad if needs[7] else None,
        ctx.no_packed,
    )


def _has_kernels(grad: Tensor) -> bool:
    """Whether gradients are an op of their own; off a CPU they are PyTorch's."""
    return not grad.is_cuda and requested(_BACKWARD.name) in ("auto", "reference", cpu.NAME)


_OP.autograd(_setup_context, _backward)


def _pointwise(weight: Tensor, stride: int, padding: Sequence[int]) -> bool:
    """Whether the convolution is a linear layer on each pixel."""
    return weight.shape[2:] == (1, 1) and stride == 1 and not any(padding)


def _few_pixels(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> bool:
    """Whether gathering the windows costs less than oneDNN's reordering of the weight."""
    batch, out, height, width = _output_size(x, weight, stride, padding)
    return 2 * batch * height * width <= out


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    form, both = format_of(x, weight), x if x2 is None else torch.cat((x, x2), 1)
    if residual is not None:
        residual = residual.contiguous(memory_format=form)
    if packed and packed[0].is_mkldnn:
        both = both.contiguous(memory_format=form)
        y = onednn.conv2d(both, packed[0], bias, stride, padding, residual)
    elif _pointwise(weight, stride, padding):
        y = _product(both.permute(0, 2, 3, 1), weight.flatten(1), bias, residual)
    elif _few_pixels(x, weight, stride, padding):
        y = _product(*_windows(both, weight, stride, padding), bias, residual)
    else:
        both = both.contiguous(memory_format=form)
        y = onednn.conv2d(both, weight, bias, stride, padding, residual)
    if add is not None:
        y = y.add_(add[..., None, None])
    return y.contiguous(memory_format=form)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Rows [B, H, W, K] times a weight [O, K], as [B, O, H, W]."""
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).contiguous()
    return onednn.linear(rows, weight, bias, "add", residual).permute(0, 3, 1, 2)


def _windows(
    x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The window of each output pixel as a row, [B, H', W', K], and the weight as [O, K].

    K counts channels and places in the window in the order in which the weight lies in memory.
    """
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, *padding))
    for dim, size in enumerate(weight.shape[2:], 1):
        x = x.unfold(dim, size, stride)  # at last [B, H', W', C, kh, kw]
    if format_of(weight) == torch.channels_last:
        x, weight = x.permute(0, 1, 2, 4, 5, 3), weight.permute(0, 2, 3, 1)
    return x.flatten(3), weight.flatten(1)


def _onednn_supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Sequence[Tensor],
) -> list[str]:
    if packed and packed[0].is_mkldnn:
        return onednn.takes(x)
    batch, _, height, width = _output_size(x, weight, stride, padding)
    if batch * height * width * weight.numel() < onednn.SMALL:
        return [onednn.TOO_SMALL]
    if residual is None:
        last = format_of(x, weight) == torch.channels_last
        pointwise = last and _pointwise(weight, stride, padding)
        if not pointwise and not _few_pixels(x, weight, stride, padding):
            return ["F.conv2d is oneDNN's own, and there is no packed weight and no residual"]
    return onednn.takes(x)


def _kernels() -> ModuleType:
    from ..kernels import conv2d

    return conv2d


def _ways(x: Tensor, weight: Tensor, bias: Any, stride: int, pads: Any, *_: Any) -> Ways:
    """What computes a call without a second source, by the contest's names."""
    ways: dict[str, Callable[..., Tensor]] = {}
    for name, packer in _PACKERS.items():
        ours = name in ("winograd", UNPACKED)
        if ours and winograd.fits(weight, stride):
            continue
        packed = packer(weight, size=x.shape, stride=stride, pads=pads)
        ways[name] = packed_call(winograd.forward if ours else _onednn, packed)
    return ways


_CONTEST = Contest(
    *(_OP, products.conv2d_kind_of, products.conv2d_example),
    ways=_ways,
    names=tuple(_PACKERS),
)
_BACKWARD_CONTEST = Contest(
    *(_BACKWARD, products.conv2d_backward_kind_of, products.conv2d_backward_example),
    ways=lambda *_: {"reference": reference_backward, cpu.NAME: winograd.backward},
)
_direct_is_faster = _CONTEST.slower(UNPACKED, among=("direct", UNPACKED), otherwise="direct")


def _slower(*args: Any) -> list[str]:
    """Why "auto" doesn't transform the weight of a call, unless an engine has done so."""
    packed = args[-1]
    if winograd.is_packed(packed):
        return []
    return ["its weight is packed for another way"] if packed else _direct_is_faster(*args)


cpu.add(_OP, lambda: winograd.forward, winograd.supports, _slower)
cpu.add(
    _BACKWARD,
    lambda: winograd.backward,
    winograd.backward_supports,
    _BACKWARD_CONTEST.slower(cpu.NAME, otherwise="reference"),
)
_OP.add(Backend("onednn", lambda: _onednn, onednn.machine, _onednn_supports, forward_only=True))
triton.add(_OP, _kernels, measured=True)
