"""Layer normalization over the last dimension (Ba et al. 2016)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import Op, autocast, checks, triton


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension.

    Args:
        x: [..., C].
        weight, bias: [C], of the dtype and device of ``x``.
        eps: small number added to the variance.

    Under autocast tensors of several dtypes are promoted and the result has the dtype that
    F.layer_norm would give.

    Returns:
        Like ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't match.

    Examples:
        >>> x = torch.randn(2, 10, 64)
        >>> y = df.ops.layer_norm(x, torch.ones(64), torch.zeros(64))
        >>> torch.allclose(y, torch.nn.functional.layer_norm(x, (64,)), atol=1e-5)
        True
    """
    return _OP(x, weight, bias, eps)


def _under_autocast(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> autocast.Policy:
    (x, weight, bias), dtype = autocast.norm(x, (x,), (weight, bias))
    return (x, weight, bias, eps), dtype


def _check(x: Any, weight: Any, bias: Any, eps: float) -> None:
    checks.together({"x": x, "weight": weight, "bias": bias})
    if x.dim() < 1:
        checks.fail("x", "shape [..., C]", list(x.shape))
    channels = x.shape[-1:]
    checks.shapes(("weight", weight, channels, "[C]"), ("bias", bias, channels, "[C]"))
    checks.not_negative("eps", eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    compute = torch.promote_types(x.dtype, torch.float32)
    variance, mean = torch.var_mean(x.to(compute), dim=-1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    u, dy = (x.to(compute) - mean) * rstd, grad.to(compute)
    du = dy * weight.to(compute)
    dx = rstd * (du - du.mean(-1, keepdim=True) - u * (du * u).mean(-1, keepdim=True))
    rows = (-1, x.shape[-1])
    return (
        dx.to(x.dtype).contiguous(),
        (dy * u).reshape(rows).sum(0).to(x.dtype),
        dy.reshape(rows).sum(0).to(x.dtype),
    )


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_OP = Op(
    "layer_norm",
    reference,
    _fake,
    public=layer_norm,
    check=_check,
    policy=_under_autocast,
)
_BACKWARD = Op(
    "layer_norm_backward",
    reference_backward,
    lambda grad, x, weight, eps: (_fake(x), torch.empty_like(weight), torch.empty_like(weight)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_BACKWARD(grad, *ctx.saved_tensors, ctx.eps), None


_OP.autograd(_setup_context, _backward)


def _kernels() -> ModuleType:
    from ..kernels import layer_norm

    return layer_norm


def rows_fit(x: Tensor, *_: Any) -> list[str]:
    """Why the kernels can't hold a row of ``x`` [..., C], which is one block of theirs."""
    return [f"rows of {x.shape[-1]}, more than 16384"] if x.shape[-1] > 16384 else []


for _op in (_OP, _BACKWARD):
    triton.add(_op, _kernels, rows_fit)
