"""A linear layer with what follows it: bias, gate, residual, and the LayerNorm before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import onednn
from .cpu import library as cpu
from .cpu import linear as on_cpu
from .cpu import products
from .cpu.contest import Contest, Ways, packed_call
from .dispatch import Backend, Op, autocast, checks, triton
from .dispatch.backend import requested
from .geglu import geglu as gate
from .geglu import reference as _gated
from .geglu import reference_backward as _gated_backward

Norm = tuple[Tensor, Tensor, Tensor]
NO_NORM = (None, None, None)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    geglu: bool = False,
    norm: Norm | None = None,
    packed: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""x W^T + b with its neighbours in a transformer block.

    A LayerNorm before the layer, :math:`u = (x - \mu) r \gamma + \beta`, folds into it, because
    :math:`u W^T + b = r (x W'^T - \mu s) + b'` with :math:`W' = W \gamma`, its column sums
    :math:`s_n = \sum_k W'_{nk}` and :math:`b' = b + W \beta`.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N]; None adds nothing.
        residual: what is added last, of the result's shape.
        geglu: ends with first half * gelu(second half) of the N outputs (Shazeer 2020).
        norm: (mean [...], rstd [...], column sums [N]) of a folded LayerNorm, float32 (float64 for
            float64); ``weight`` and ``bias`` are W' and b' then.
        packed: what :func:`pack_linear` made of ``weight``; it changes the speed, not the result.

    Under autocast the tensors are cast to its dtype, as F.linear casts them.

    Returns:
        [..., N], or [..., N / 2] with ``geglu``; contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, or an odd N with ``geglu``.

    Examples:
        >>> x, weight = torch.randn(2, 10, 64), torch.randn(32, 64)
        >>> residual = torch.randn(2, 10, 32)
        >>> y = df.ops.linear(x, weight, residual=residual)
        >>> torch.allclose(y, x @ weight.T + residual, atol=1e-4)
        True
    """
    if geglu and residual is None and _keeps_product(x, weight, bias):
        return gate(_OP(x, weight, bias, None, False, *(norm or NO_NORM), ()))
    return _OP(x, weight, bias, residual, geglu, *(norm or NO_NORM), packed or ())


def _cast(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, geglu: bool, *norm_and_packed: Any
) -> autocast.Policy:
    *norm, packed = norm_and_packed
    tensors = autocast.cast(x.device, x, weight, bias, residual)
    if tensors[1].dtype != weight.dtype:
        packed = ()  # it holds the weight as it was
    return (*tensors, geglu, *norm, packed), None


def _check(
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    geglu: bool,
    mean: Any,
    rstd: Any,
    sums: Any,
    packed: Any,
) -> None:
    checks.together({"x": x, "weight": weight}, bias=bias, residual=residual)
    if x.dim() < 1:
        checks.fail("x", "shape [..., K]", list(x.shape))
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        checks.fail("weight", f"shape [N, K] with K = {x.shape[-1]}", list(weight.shape))
    out = weight.shape[0]
    if geglu and out % 2:
        checks.fail("weight", "an even number of rows with geglu", list(weight.shape))
    result = *x.shape[:-1], out // (2 if geglu else 1)
    checks.shapes(("bias", bias, (out,), "[N]"), ("residual", residual, result, "[..., N]"))
    if packed:
        sizes, wanted = [list(one.shape) for one in packed], [[result[-1], x.shape[-1]]]
        if on_cpu.is_packed(packed):
            wanted = [on_cpu.packed_size(weight, geglu)]
        elif geglu:
            wanted *= 2
        if sizes != wanted:
            expected = f"what is made of a weight {list(weight.shape)} with geglu={geglu}"
            checks.fail("packed", expected, sizes)
    if mean is None:
        return
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[:-1]
    for name, value, shape, meaning in (
        ("norm[0]", mean, rows, "[...] of x"),
        ("norm[1]", rstd, rows, "[...] of x"),
        ("norm[2]", sums, (out,), "[N]"),
    ):
        checks.tensor(name, value)
        checks.shape(name, value, shape, meaning)
        checks.same_device(name, value, "x", x)
        if value.dtype != compute:
            checks.fail(name, f"dtype {compute}", value.dtype)


def pack_linear(weight: Tensor, rows: int, *, geglu: bool = False) -> onednn.Packed | None:
    """What :func:`linear` takes as ``packed``, in a layout of its own: a copy of the weight.

    On a CPU that is oneDNN's layout, or our kernel's where an engine has measured that to be
    faster, or under ``use_backend(linear="cpu")``.

    Args:
        weight: [N, K].
        rows: how many rows ``x`` will have, all its dimensions but the last; others work as well,
            perhaps slower.
        geglu: whether the packed weight is for calls with ``geglu=True``, and for those only.

    Returns:
        None where packing does nothing: off the CPU, without oneDNN, for the weight's dtype, for
        a small product, or where an engine has measured another way to be faster on this CPU.

    Raises:
        ValueError: not a floating [N, K], an odd N with ``geglu``, or rows below 1.

    Examples:
        >>> x, weight = torch.randn(2, 10, 64), torch.randn(32, 64)
        >>> packed = df.ops.pack_linear(weight, rows=20)
        >>> y = df.ops.linear(x, weight, packed=packed)
        >>> torch.allclose(y, df.ops.linear(x, weight), atol=1e-4)
        True
    """
    return _packer(weight, rows, geglu)(weight, rows, geglu)


Packer = Callable[[Tensor, int, bool], onednn.Packed | None]


# How a weight is laid out for each way of the contest.
_PACKERS: dict[str, Packer] = {
    "packed": onednn.pack_linear,
    "cpu": on_cpu.pack,
    "onednn": lambda *_: None,
    "reference": lambda *_: None,
}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    mean: Tensor | None,
    rstd: Tensor | None,
    sums: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    if mean is None:
        y = F.linear(x, weight, bias)
    else:
        compute = mean.dtype
        y = _normalized(F.linear(x.to(compute), weight.to(compute)), bias, mean, rstd, sums)
        y = y.to(x.dtype)
    if geglu:
        y = gate(y)  # whose kernel, where there is one, keeps nothing but its input
    return (y if residual is None else y + residual).contiguous()


def _normalized(product: Tensor, bias: Tensor | None, mean: Any, rstd: Any, sums: Any) -> Tensor:
    """The folded LayerNorm, in the dtype of its statistics: x - mean cancels."""
    y = rstd[..., None] * (product - mean[..., None] * sums)
    return y if bias is None else y + bias


def _fake(x: Tensor, weight: Tensor, bias: Any, residual: Any, geglu: bool, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if geglu else 1)))


_OP = Op(
    "linear",
    reference,
    _fake,
    public=linear,
    check=_check,
    policy=_cast,
)


@_OP.kept
def _packer(weight: Tensor, rows: int, geglu: bool) -> Packer:
    """What lays out weights like this one."""
    checks.floating("weight", weight)
    checks.positive_int("rows", rows)
    if weight.dim() != 2 or (geglu and weight.shape[0] % 2):
        checks.fail("weight", "shape [N, K], N even with geglu", list(weight.shape))
    if not onednn.supports(weight.device.type, weight.dtype):
        return _PACKERS["reference"]
    large = rows * weight.numel() >= onednn.SMALL  # those that oneDNN takes, see below
    asked, usual = requested("linear"), "packed" if large else "reference"
    way = usual
    if asked == cpu.NAME:
        way = "cpu"
    elif asked == "auto":
        way = next(iter(_CONTEST.order(products.linear_kind(weight, rows, geglu))), usual)
    if way == "cpu" and (weight.dtype != torch.float32 or cpu.settle()):
        way = usual
    return _PACKERS[way]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _, ctx.geglu, mean, rstd, sums, packed = inputs
    ctx.no_packed = [None] * len(packed)
    ctx.save_for_backward(x, weight, bias, mean, rstd, sums)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd, sums = ctx.saved_tensors
    needs, rows = ctx.needs_input_grad, math.prod(x.shape[:-1])
    compute = x.dtype if mean is None else mean.dtype
    x2, w = x.to(compute).reshape(rows, x.shape[-1]), weight.to(compute)
    dy = grad.to(compute).reshape(rows, grad.shape[-1])
    if mean is not None:
        mean2, rstd2 = mean.reshape(rows, 1), rstd.reshape(rows, 1)
        centred = F.linear(x2, w) - mean2 * sums
    if ctx.geglu:
        y = F.linear(x2, w, bias) if mean is None else centred * rstd2
        dy = _gated_backward(dy, y if mean is None or bias is None else y + bias)
    dbias = dy.sum(0).to(x.dtype) if needs[2] else None
    dmean = drstd = dsums = None
    if mean is not None:
        drstd = (dy * centred).sum(-1).reshape(mean.shape)
        dy = dy * rstd2
        dmean = -(dy @ sums).reshape(mean.shape)
        dsums = -(dy * mean2).sum(0)
    dx = _product(dy, w.mT).to(x.dtype).reshape(x.shape) if needs[0] else None
    dweight = _product(dy.mT, x2.mT).to(x.dtype) if needs[1] else None
    return dx, dweight, dbias, grad if needs[3] else None, None, dmean, drstd, dsums, ctx.no_packed


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of two matrices: on a CPU a linear layer too, whose ways may have been measured."""
    if _by_libraries(x):
        return _OP(x, weight, None, None, False, *NO_NORM, ())
    return x @ weight.mT


def _by_libraries(x: Tensor) -> bool:
    """Whether no kernel of ours computes what needs a gradient."""
    return not x.is_cuda and requested("linear") in ("auto", "onednn")


def _keeps_product(x: Any, weight: Any, bias: Any) -> bool:
    """Whether a gate is an op of its own: to compute its input again costs a third of a step."""
    if not checks.needs_gradient(x, weight, bias) or not isinstance(x, Tensor):
        return False
    return _by_libraries(x) and isinstance(weight, Tensor) and len(weight) % 2 == 0


_OP.autograd(_setup_context, _backward)


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    mean: Tensor | None,
    rstd: Tensor | None,
    sums: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    if on_cpu.is_packed(packed):
        packed = ()
    if mean is not None:
        y = _normalized(onednn.linear(x, weight, None), bias, mean, rstd, sums)
        y = _gated(y) if geglu else y
    elif not geglu:
        return onednn.linear(x, packed[0] if packed else weight, bias, "add", residual)
    else:
        half = weight.shape[0] // 2
        values, gates = packed or (weight[:half], weight[half:])
        of_values, of_gates = (None, None) if bias is None else (bias[:half], bias[half:])
        factor = onednn.linear(x, gates, of_gates, "gelu")
        y = onednn.linear(x, values, of_values, "mul", factor)
    return y if residual is None else y.add_(residual)


def _onednn_supports(
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
    if x.numel() * weight.shape[0] < onednn.SMALL:
        return [onednn.TOO_SMALL]
    if mean is not None and mean.dtype != x.dtype:
        return [f"it would round the product to {x.dtype} before the mean is subtracted"]
    return onednn.takes(x)


def _kernels() -> ModuleType:
    from ..kernels import linear

    return linear


def _has_columns(x: Tensor, *_: Any) -> list[str]:
    return [] if x.shape[-1] else ["rows of nothing"]


def _ways(x: Tensor, weight: Tensor, bias: Any, residual: Any, geglu: bool, *_: Any) -> Ways:
    """What computes a call, by the contest's names."""
    ways: dict[str, Callable[..., Tensor]] = {}
    runs = (_onednn, on_cpu.forward, _onednn, reference)
    small = x.numel() * weight.shape[0] < onednn.SMALL
    by_rows = x.is_contiguous() and weight.is_contiguous()
    for (name, pack), run in zip(_PACKERS.items(), runs, strict=True):
        if (small and run is _onednn) or (name in ("packed", cpu.NAME) and not by_rows):
            continue
        ways[name] = packed_call(run, pack(weight, len(x), geglu))
    return ways


_CONTEST = Contest(
    _OP,
    products.linear_kind_of,
    products.linear_example,
    ways=_ways,
    names=tuple(_PACKERS),
)
_OPEN = ("onednn", "reference")
_other_is_faster = _CONTEST.slower("onednn", among=_OPEN)
_other_is_faster_in_training = _CONTEST.slower("onednn", among=_OPEN, otherwise="reference")


def _slower(*args: Any) -> list[str]:
    """Why "auto" leaves a call to the definition; a weight that is packed was measured then."""
    if checks.needs_gradient(*args):
        return _other_is_faster_in_training(*args)
    return [] if args[-1] else _other_is_faster(*args)


cpu.add(_OP, lambda: on_cpu.forward, on_cpu.supports, forward_only=True)
_OP.add(
    Backend(
        "onednn",
        lambda: _onednn,
        onednn.machine,
        _onednn_supports,
        _slower,
        _slower,
    )
)
triton.add(_OP, _kernels, _has_columns, measured=True)
