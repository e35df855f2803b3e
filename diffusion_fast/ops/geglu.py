"""The gated linear unit of transformer feed-forward layers (Shazeer 2020)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import geglu as on_cpu
from .cpu import library as cpu
from .dispatch import Op, checks, triton


def geglu(x: Tensor) -> Tensor:
    """first half * gelu(second half), with the exact (erf) gelu.

    Args:
        x: [..., 2C].

    Returns:
        [..., C], contiguous.

    Raises:
        ValueError: not a floating tensor with an even last dimension.

    Examples:
        >>> x = torch.randn(2, 10, 64)
        >>> value, gate = x.chunk(2, -1)
        >>> torch.allclose(df.ops.geglu(x), value * torch.nn.functional.gelu(gate), atol=1e-6)
        True
    """
    return _OP(x)


def _check(x: Any) -> None:
    checks.floating("x", x)
    if x.dim() < 1 or x.shape[-1] % 2:
        checks.fail("x", "shape [..., 2C] with an even last dimension", list(x.shape))


def reference(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return (value * F.gelu(gate)).contiguous()


def reference_backward(grad: Tensor, x: Tensor) -> Tensor:
    """gelu(g) = g * Phi(g), gelu'(g) = Phi(g) + g * phi(g), with the normal's Phi and phi."""
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return torch.cat((grad * gate * cdf, grad * value * (cdf + gate * density)), dim=-1).to(x.dtype)


_OP = Op(
    "geglu",
    reference,
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    public=geglu,
    check=_check,
)
_BACKWARD = Op(
    "geglu_backward",
    reference_backward,
    lambda grad, x: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _BACKWARD(grad, *ctx.saved_tensors)


_OP.autograd(_setup_context, _backward)


def _kernels() -> ModuleType:
    from ..kernels import geglu

    return geglu


for _op in (_OP, _BACKWARD):
    triton.add(_op, _kernels)
cpu.add(_OP, lambda: on_cpu.forward, slower=on_cpu.slower)
cpu.add(_BACKWARD, lambda: on_cpu.backward, cpu.first_order)
