"""Mean and deviation of rows: what a layer norm that is folded into a product still needs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import Op, checks, triton
from .layer_norm import rows_fit


def row_statistics(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) over the last dimension, as a layer norm takes them.

    :func:`diffusion_fast.ops.linear` takes them as its ``norm``.

    Args:
        x: [..., C].
        eps: small number added to the variance of the whole row (divided by C).

    Returns:
        mean and rstd [...], float32, or float64 for float64. They are made in two passes, so that
        a large mean costs the variance nothing.

    Raises:
        ValueError: another dtype, no last dimension, or nothing in it.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        >>> mean, rstd = df.ops.row_statistics(x, eps=0.25)
        >>> mean, rstd
        (tensor([2., 2.]), tensor([0.8944, 2.0000]))
    """
    return _OP(x, eps)


def _check(x: Any, eps: float) -> None:
    checks.floating("x", x)
    if x.dim() < 1 or not x.shape[-1]:
        checks.fail("x", "shape [..., C] with C of at least 1", list(x.shape))
    checks.not_negative("eps", eps)


def reference(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(-1)
    # On a CPU torch.var_mean takes ten times as long.
    norm = torch.linalg.vector_norm(x - mean[..., None], dim=-1)
    return mean, (norm.square() / x.shape[-1] + eps).rsqrt()


def _fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:-1], dtype=dtype), x.new_empty(x.shape[:-1], dtype=dtype)


_OP = Op("row_statistics", reference, _fake, public=row_statistics, check=_check)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, dmean: Tensor, drstd: Tensor) -> tuple[Tensor, None]:
    """dx = (dmean - drstd rstd^3 (x - mean)) / C; rare enough to need no kernel of its own."""
    x, mean, rstd = ctx.saved_tensors
    slope = (drstd * rstd**3)[..., None]
    dx = (dmean[..., None] - slope * (x.to(mean.dtype) - mean[..., None])) / x.shape[-1]
    return dx.to(x.dtype), None


_OP.autograd(_setup_context, _backward)


def _kernels() -> ModuleType:
    from ..kernels import row_statistics

    return row_statistics


triton.add(_OP, _kernels, rows_fit)
