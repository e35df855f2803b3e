"""What stands between a layer and the next where no epilogue reaches: bias, residual, scale."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import Op, autocast, checks, triton


def residual(
    x: Tensor,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dim: int = 1,
) -> Tensor:
    """(x + bias + residual) * scale, in one pass.

    Args:
        x: any shape.
        residual: like ``x``; None adds nothing.
        bias: [C], the size of dimension ``dim`` of ``x``, of its dtype; None adds nothing.
        scale: factor such as 1 / sqrt(2), or 1 over a block's output scale factor.
        dim: the dimension of the channels: 1 for convolutions, -1 for linear layers.

    Under autocast tensors of several dtypes are promoted, as ``+`` promotes them.

    Returns:
        Like ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, a dimension that x doesn't have, or
            a scale that is not finite.

    Examples:
        >>> x, before, bias = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(4)
        >>> y = df.ops.residual(x, before, bias)
        >>> torch.allclose(y, x + before + bias[:, None, None], atol=1e-6)
        True
    """
    return _OP(x, residual, bias, scale, dim)


def _check(x: Any, residual: Any, bias: Any, scale: Any, dim: Any) -> None:
    checks.together({"x": x}, residual=residual, bias=bias)
    checks.finite("scale", scale)
    checks.shapes(("residual", residual, x.shape, "of x"))
    if bias is not None:
        expected = f"a dimension of x {list(x.shape)}"
        if checks.whole("dim", dim, expected, -x.dim()) >= x.dim():
            checks.fail("dim", expected, dim)
        checks.shape("bias", bias, (x.shape[dim],), "[C]")


def reference(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, scale: float, dim: int
) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, *(1,) * (x.dim() - 1 - dim % x.dim()))
    if residual is not None:
        y = y + residual
    y = y * scale
    return y.to(x.dtype) if checks.transformed() else torch.empty_like(x).copy_(y)


def reference_backward(
    grad: Tensor, scale: float, dim: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and the residual) and of bias, empty where it has none."""
    dx = grad.to(torch.promote_types(grad.dtype, torch.float32)) * scale
    dbias = grad.new_empty(0)
    if with_bias:
        others = [d for d in range(grad.dim()) if d != dim % grad.dim()]
        dbias = dx.sum(others) if others else dx
        dbias = dbias.to(grad.dtype, copy=True)
    return torch.empty_like(grad).copy_(dx), dbias


_OP = Op(
    "residual",
    reference,
    lambda x, *_: torch.empty_like(x),
    public=residual,
    check=_check,
    policy=autocast.promoted,
)
_BACKWARD = Op(
    "residual_backward",
    reference_backward,
    lambda grad, scale, dim, with_bias: (
        torch.empty_like(grad),
        grad.new_empty(grad.shape[dim] if with_bias else 0),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, residual, bias, ctx.scale, ctx.dim = inputs
    ctx.with_residual, ctx.with_bias = residual is not None, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = _BACKWARD(grad, ctx.scale, ctx.dim, ctx.with_bias)
    dresidual = dx if ctx.with_residual else None
    return dx, dresidual, dbias if ctx.with_bias else None, None, None


_OP.autograd(_setup_context, _backward)


def _kernels() -> ModuleType:
    from ..kernels import residual

    return residual


for _op in (_OP, _BACKWARD):
    triton.add(_op, _kernels)
