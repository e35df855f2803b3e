"""Layer normalization over the last dimension (Ba et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autocast, checks, norm_checks, triton_backend
from .op import Op


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension.

    Args:
        x: [..., C].
        weight, bias: [C], of the dtype and device of ``x``.
        eps: added to the variance.

    Under autocast tensors of several dtypes are promoted and the result has the dtype that
    F.layer_norm would give.

    Returns:
        Like ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't match.
    """
    return _OP(x, weight, bias, checks.not_negative("eps", eps))


def _under_autocast(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> autocast.Policy:
    (x, weight, bias), dtype = autocast.norm(x, (x,), (weight, bias))
    return (x, weight, bias, eps), dtype


def _check(x: Any, weight: Any, bias: Any, eps: float) -> None:
    checks.floating("x", x)
    if x.dim() < 1:
        checks.fail("x", "shape [..., C]", list(x.shape))
    norm_checks.beside("weight", weight, x.shape[-1:], "[C]", x)
    norm_checks.beside("bias", bias, x.shape[-1:], "[C]", x)


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
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference,
    _fake,
    _check,
    _under_autocast,
)
_BACKWARD = Op(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    reference_backward,
    lambda grad, x, weight, eps: (_fake(x), torch.empty_like(weight), torch.empty_like(weight)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_BACKWARD(grad, *ctx.saved_tensors, ctx.eps), None


_OP.autograd(_setup_context, _backward)


def _kernel_unsupported(*args: Any) -> str | None:
    """A row is one block of the kernel, whose size is bounded."""
    columns = args[0].shape[-1]
    return f"rows of {columns}, more than 16384" if columns > 16384 else None


for _op in (_OP, _BACKWARD):
    triton_backend.add(_op, "layer_norm", _kernel_unsupported)
