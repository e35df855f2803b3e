"""geglu and its gradient on the kernel of csrc/cpu."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..dispatch.backend import requested
from . import library
from .library import DTYPES

LEAST = 2**14  # elements of x from which the kernel is faster than PyTorch's three

# ``Geglu`` of csrc/cpu/geglu.h.
_ARGUMENTS = struct.Struct("@3P 2q 2i")


def slower(x: Tensor) -> list[str]:
    """Why "auto" leaves a call to PyTorch."""
    few = x.numel() < LEAST and requested("geglu") == "auto"
    return [f"fewer than {LEAST:,} elements"] if few else []


def _run(x: Tensor, grad: Tensor | None, out: Tensor) -> Tensor:
    columns = x.shape[-1] // 2
    arguments = _ARGUMENTS.pack(
        *(0 if one is None else one.data_ptr() for one in (x, grad, out)),
        *(x.numel() // (2 * columns), columns, DTYPES[x.dtype], torch.get_num_threads()),
    )
    library.kernels.geglu(arguments)
    return out


def forward(x: Tensor) -> Tensor:
    """[..., C] of x [..., 2C]."""
    return _run(x.contiguous(), None, x.new_empty(*x.shape[:-1], x.shape[-1] // 2))


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """[..., 2C], the gradient of x."""
    x = x.contiguous()
    return _run(x, grad.contiguous(), torch.empty_like(x))
