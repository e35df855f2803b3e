"""Attention on the kernel of csrc/cpu: float32 sums of all dtypes, forward only."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import checks
from . import library
from .contest import Kind
from .library import DTYPES

_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


# The contest's kinds of calls: dtype, head width at most, and whether the keys are many.
WIDTHS = (40, 64, 80, 160, 512)
MANY = 256


def kind_of(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, *_: Any
) -> Kind | None:
    """The kind of a call; None where nothing was measured that is like it."""
    if q.dtype not in (torch.float32, torch.bfloat16) or checks.needs_gradient(q, k, v, bias):
        return None
    width = next((width for width in WIDTHS if q.shape[-1] <= width), WIDTHS[-1])
    return str(q.dtype), width, k.shape[1] >= MANY


def _example(dtype: torch.dtype, width: int, many: bool) -> tuple[Any, ...]:
    """A call of this kind, with work for all threads, of a few milliseconds."""
    generator, heads = torch.Generator().manual_seed(0), torch.get_num_threads()
    q = torch.randn(1, 512, heads, width, generator=generator).to(dtype)
    k = torch.randn(1, 1024 if many else 77, heads, width, generator=generator).to(dtype)
    return q, k, k, width**-0.5, None, None, False


KINDS: dict[Kind, Callable[[], tuple[Any, ...]]] = {
    (str(dtype), width, many): functools.partial(_example, dtype, width, many)
    for dtype in (torch.float32, torch.bfloat16)
    for width in WIDTHS
    for many in (False, True)
}


def default(kind: Kind) -> str | None:
    """Many CPUs have products in bfloat16, which the kernel does not use."""
    return "sdpa" if kind[0] == str(torch.bfloat16) else None


class _Arguments(ctypes.Structure):
    """``Attention`` of csrc/cpu/attention.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "out", "bias", "lengths")),
        *((f"{name}_strides", _INT * 3) for name in ("q", "k", "v")),
        ("bias_strides", _INT * 4),
        *((name, _INT) for name in ("batch", "heads", "queries", "keys", "dim")),
        ("scale", ctypes.c_double),
        *((name, _FLAG) for name in ("dtype", "threads")),
    )


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> list[str]:
    """Why this call is not for the kernel; empty if it is."""
    if save_lse:
        return ["it keeps no log-sum-exp"]
    needed = checks.needs_gradient(q, k, v, bias)
    return ["a gradient is needed"] if needed else []


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D], and no log-sum-exp."""
    c = _Arguments()
    c.batch, c.queries, c.heads, c.dim = q.shape
    c.keys, c.scale = k.shape[1], scale
    c.dtype, c.threads = DTYPES[q.dtype], torch.get_num_threads()
    kept = []
    for name, value in (("q", q), ("k", k), ("v", v)):
        value = value if value.stride(-1) == 1 else value.contiguous()
        strides = value.stride()[:3]
        shared = len(value) == 1  # by all images
        setattr(c, f"{name}_strides", (_INT * 3)(0 if shared else strides[0], *strides[1:]))
        setattr(c, name, value.data_ptr())
        kept.append(value)
    if bias is not None:
        bias = bias.float().expand(len(q), q.shape[2], q.shape[1], k.shape[1])
        c.bias, c.bias_strides = bias.data_ptr(), (_INT * 4)(*bias.stride())
    if key_lengths is not None:
        key_lengths = key_lengths.long().contiguous()
        c.lengths = key_lengths.data_ptr()
    out = torch.empty(q.shape, dtype=q.dtype)
    c.out = out.data_ptr()
    library.kernels.attention(ctypes.byref(c))
    return out, q.new_empty(0, dtype=torch.float32)
