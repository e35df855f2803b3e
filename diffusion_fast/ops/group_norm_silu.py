"""GroupNorm with its neighbours in a U-Net: time embedding before; scale, shift, SiLU after."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.layout import format_of
from .cpu import group_norm as on_cpu
from .cpu import library as cpu
from .dispatch import Op, autocast, checks, triton
from .rows import picked_row


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    x2: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    r"""Group normalization (Wu & He 2018) with its neighbours.

    .. math:: y = \mathrm{silu}\big(\mathrm{GN}(x + \mathrm{add}) \cdot (1 + \mathrm{scale})
              + \mathrm{shift}\big)

    Args:
        x: [B, C, ...], contiguous or channels_last.
        num_groups: number of groups, a divisor of C.
        weight, bias: the affine of the norm, [C].
        eps: small number added to the variance.
        silu: whether the result ends with x * sigmoid(x).
        add: [B, C], joins x before the statistics (time embedding).
        scale, shift: [B, C], after the affine and before SiLU (adaptive norm).
        x2: [B, C2, ...], joins x behind its last channel, as ``torch.cat((x, x2), 1)`` would (the
            skip connection of a U-Net); then C counts the channels of both.
        row: int64 [1], on the device of ``x``: ``add``, ``scale`` and ``shift`` are then tables
            [R, B or 1, C], of which this row is read (the step of a sampling loop, counted on the
            device). Or int64 [B], a row for each image. On a GPU nobody checks that they are among
            the R.

    Under autocast tensors of several dtypes are promoted and the result has the dtype that
    F.group_norm and the arithmetic around it would give.

    Returns:
        [B, C, ...], in the memory format of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, or groups that don't divide C.

    Examples:
        >>> norm = torch.nn.GroupNorm(8, 64)
        >>> x, time = torch.randn(2, 64, 16, 16), torch.randn(2, 64)
        >>> y = df.ops.group_norm_silu(x, 8, norm.weight, norm.bias, add=time)
        >>> plain = torch.nn.functional.silu(norm(x + time[:, :, None, None]))
        >>> torch.allclose(y, plain, atol=1e-5)
        True
    """
    return _OP(x, num_groups, weight, bias, eps, silu, add, scale, shift, x2, row)


def _under_autocast(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Any,
    scale: Any,
    shift: Any,
    x2: Any,
    row: Any,
) -> autocast.Policy:
    values, dtype = autocast.norm(x, (x, x2, add, scale, shift), (weight, bias))
    x, x2, add, scale, shift, weight, bias = values
    return (x, num_groups, weight, bias, eps, silu, add, scale, shift, x2, row), dtype


def _check(
    x: Any,
    num_groups: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    silu: Any,
    add: Any,
    scale: Any,
    shift: Any,
    x2: Any,
    row: Any,
) -> None:
    needed = {"x": x, "weight": weight, "bias": bias}
    checks.together(needed, x2=x2, add=add, scale=scale, shift=shift)
    if x.dim() < 2:
        checks.fail("x", "shape [B, C, ...]", list(x.shape))
    batch, channels = x.shape[:2]
    if x2 is not None:
        if x2.dim() != x.dim():
            checks.fail("x2", f"{x.dim()} dimensions, as x has", x2.dim())
        checks.shape("x2", x2, (batch, x2.shape[1], *x.shape[2:]), "[B, C2, ...]")
        channels += x2.shape[1]
    checks.positive_int("num_groups", num_groups)
    checks.not_negative("eps", eps)
    if channels % num_groups:
        checks.fail("num_groups", f"a divisor of the {channels} channels of x", num_groups)
    expected: list[Any] = [
        ("weight", weight, (channels,), "[C]"),
        ("bias", bias, (channels,), "[C]"),
    ]
    vectors = {"add": add, "scale": scale, "shift": shift}
    if row is None:
        expected += [(name, v, (batch, channels), "[B, C]") for name, v in vectors.items()]
    checks.shapes(*expected)
    if row is not None:
        checks.tensor("row", row)
        if row.dtype != torch.int64:
            checks.fail("row", "dtype torch.int64", row.dtype)
        if row.shape not in ((1,), (batch,)):
            checks.fail("row", f"shape [1] or [B] = [{batch}]", list(row.shape))
        checks.same_device("row", row, "x", x)
        for name, v in vectors.items():
            if v is not None and tuple(v.shape[1:]) not in ((1, channels), (batch, channels)):
                table = f"shape [R, B or 1, C] with B, C = {[batch, channels]}"
                checks.fail(name, table, list(v.shape))


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """[B, C] beside [B, C, ...]."""
    return value.view(*value.shape, *(1,) * (x.dim() - 2))


def _picked(row: Tensor, *tables: Tensor | None) -> list[Tensor | None]:
    """[B or 1, C] of each table."""
    return [None if table is None else picked_row(table, row) for table in tables]


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    layout = format_of(x)
    if row is not None:
        add, scale, shift = _picked(row, add, scale, shift)
    if x2 is not None:
        x = torch.cat((x, x2), 1)
    if add is not None:
        x = x + _per_channel(add, x)
    if x.is_cpu and x.dim() > 3 and x.stride(1) <= x.stride(-1):
        x = _normalized(x, num_groups, weight, bias, eps)
    else:
        x = torch.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        x = x * (1 + _per_channel(scale, x))
    if shift is not None:
        x = x + _per_channel(shift, x)
    if silu:
        x = F.silu(x, inplace=not x.requires_grad)  # autograd would keep the SiLU's input
    return x.contiguous(memory_format=layout)


def _normalized(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The norm alone of an image whose channels are innermost, on a CPU.

    There PyTorch makes the variance from sums of squares, which cancel beside a large mean. Here
    the mean is taken off before, in a pass of its own; a norm does not depend on it.
    """
    space, batch, channels = tuple(range(2, x.dim())), len(x), x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(space).view(batch, groups, -1).mean(2, keepdim=True)  # [B, G, 1]
    mean = mean.expand(-1, -1, channels // groups).reshape(batch, channels, *(1,) * len(space))
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    return torch.group_norm(wide - mean, groups, weight, bias, eps).to(x.dtype)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, add, scale, shift and x2; empty for an argument that is None.

    With u = (x + add - mean) * rstd and p = u * weight + bias, z = p * (1 + scale) + shift.
    """
    dtype, layout = x.dtype, format_of(x)
    first, layout2 = x.shape[1], None if x2 is None else format_of(x2)
    if x2 is not None:
        x = torch.cat((x, x2), 1)
    compute = torch.promote_types(dtype, torch.float32)
    batch, channels = x.shape[:2]
    value = x.to(compute)
    if add is not None:
        value = value + _per_channel(add, x)
    grouped = value.reshape(batch, num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    u = ((grouped - mean) * rstd).reshape(batch, channels, -1)  # [B, C, S]
    dz = grad.to(compute).reshape(batch, channels, -1)
    w, b = weight.to(compute)[:, None], bias.to(compute)[:, None]
    factor = 1 + scale.to(compute)[..., None] if scale is not None else 1
    p = u * w + b
    if silu:
        z = p * factor + (shift.to(compute)[..., None] if shift is not None else 0)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    dp = dz * factor
    du = (dp * w).reshape(batch, num_groups, -1)
    ug = u.reshape(batch, num_groups, -1)
    dx = rstd * (du - du.mean(2, keepdim=True) - ug * (du * ug).mean(2, keepdim=True))
    dx = dx.reshape(batch, channels, -1)
    empty = x.new_empty(0)
    dboth = dx.reshape(x.shape).to(dtype)
    return (
        dboth[:, :first].contiguous(memory_format=layout),
        (dp * u).sum((0, 2)).to(dtype),
        dp.sum((0, 2)).to(dtype),
        dx.sum(2).to(dtype) if add is not None else empty,
        (dz * p).sum(2).to(dtype) if scale is not None else empty,
        dz.sum(2).to(dtype) if shift is not None else empty,
        empty if layout2 is None else dboth[:, first:].contiguous(memory_format=layout2),
    )


def _like(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))


def _fake(x: Tensor, num_groups: int, weight: Tensor, *_: Any) -> Tensor:
    return _like(x, weight.shape[0])


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
) -> tuple[Tensor, ...]:
    optional = (
        x.new_empty(0) if value is None else x.new_empty(value.shape)
        for value in (add, scale, shift)
    )
    dx2 = x.new_empty(0) if x2 is None else _like(x2, x2.shape[1])
    return _like(x, x.shape[1]), x.new_empty(weight.shape), x.new_empty(bias.shape), *optional, dx2


_OP = Op(
    "group_norm_silu",
    reference,
    _fake,
    public=group_norm_silu,
    check=_check,
    policy=_under_autocast,
)
_BACKWARD = Op("group_norm_silu_backward", reference_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.silu, *optional = inputs
    ctx.save_for_backward(x, weight, bias, *optional)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *tables, x2, row = ctx.saved_tensors
    values = tables
    if row is not None:
        values = [v if v is None else v.expand(len(x), -1) for v in _picked(row, *tables)]
    dx, dweight, dbias, *gradients, dx2 = _BACKWARD(
        grad, x, ctx.num_groups, weight, bias, ctx.eps, ctx.silu, *values, x2
    )
    optional = (
        None if table is None else _unpicked(gradient, table, row)
        for table, gradient in zip(tables, gradients, strict=True)
    )
    return dx, None, dweight, dbias, None, None, *optional, None if x2 is None else dx2, None


def _unpicked(gradient: Tensor, table: Tensor, row: Tensor | None) -> Tensor:
    """The gradient [B, C] of what was picked as that of the table: zeros elsewhere."""
    if row is None:
        return gradient
    if len(row) == 1:
        summed = gradient.sum_to_size(table.shape[1:])[None]
        return torch.zeros_like(table).index_copy(0, row, summed)
    of_image = torch.arange(len(row), device=row.device)
    if table.shape[1] == 1:
        of_image = torch.zeros_like(row)
    return torch.zeros_like(table).index_put((row, of_image), gradient, accumulate=True)


_OP.autograd(_setup_context, _backward)


def _kernels() -> ModuleType:
    from ..kernels import group_norm_silu

    return group_norm_silu


def _backward_kernels() -> ModuleType:
    from ..kernels import group_norm_silu_backward

    return group_norm_silu_backward


def _group_fits(x: Tensor, num_groups: int, weight: Tensor, *_: Any) -> list[str]:
    """A group's channels are one block of a kernel, whose size is bounded."""
    width = weight.shape[0] // num_groups
    return [f"{width} channels in a group, more than 8192"] if width > 8192 else []


triton.add(_OP, _kernels, _group_fits)
triton.add(_BACKWARD, _backward_kernels, lambda grad, *args: _group_fits(*args))
cpu.add(_OP, lambda: on_cpu.forward, slower=on_cpu.slower)
cpu.add(_BACKWARD, lambda: on_cpu.backward, cpu.first_order)
