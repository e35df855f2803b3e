"""Attention on the kernels of csrc/cpu: sums in float32; gradients of float32 alone.

In bfloat16 products are by AMX or AVX512-BF16, whichever the CPU has, or in float32.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import checks
from . import library, threads
from .contest import Kind
from .library import DTYPES

# What computes bfloat16: float32, AVX512-BF16's pairs, AMX's tiles, as csrc/cpu counts them.
WAYS = ("float32", "pairs", "tiles")
BEST = "tiles"  # that may; the best of them that the CPU has does

# The contest's kinds of calls: dtype, head width at most, and whether the keys are many.
WIDTHS = (40, 64, 80, 160, 512)
MANY = 256


def kind_of(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, *_: Any
) -> Kind | None:
    """The kind of a call; None where nothing was measured that is like it."""
    if str(q.dtype) not in _DTYPES:
        return None
    width = next((width for width in WIDTHS if q.shape[-1] <= width), WIDTHS[-1])
    return str(q.dtype), width, k.shape[1] >= MANY


def example(dtype: str, width: int, many: bool) -> tuple[Any, ...]:
    """A call of this kind, with work for all threads, of a few milliseconds."""
    generator, heads = torch.Generator().manual_seed(0), torch.get_num_threads()
    q, k = (
        _drawn(generator, count, heads, width).to(_DTYPES[dtype])
        for count in (512, 1024 if many else 77)
    )
    return q, k, k, width**-0.5, None, None, False


_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
KINDS: list[Kind] = [
    (dtype, width, many) for dtype in _DTYPES for width in WIDTHS for many in (False, True)
]


def training_kind(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Kind | None:
    """The kind of a call that needs a gradient: heads, as many as threads can take, and sizes.

    None where none is measured.
    """
    if _untrained(q, k, v, bias):
        return None
    heads = min(len(q) * q.shape[2], threads.most())
    return heads, q.shape[1], k.shape[1], q.shape[3]


def training_kind_of(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, scale: Any, bias: Any, _: Any
) -> Kind | None:
    """The same of a call of ``attention_backward``."""
    return training_kind(q, k, v, bias)


def training_example(heads: int, queries: int, keys: int, width: int) -> tuple[Any, ...]:
    """A call of ``attention_backward`` of this kind, whose result is still to be computed."""
    generator = torch.Generator().manual_seed(0)
    q, grad, k, v = (
        _drawn(generator, count, heads, width) for count in (queries, queries, keys, keys)
    )
    return grad, q, k, v, None, None, width**-0.5, None, None


def _drawn(generator: torch.Generator, count: int, heads: int, width: int) -> Tensor:
    size = 1, count, heads, width
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def _untrained(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[str]:
    """Why the kernels give no gradient of a call; empty if they do."""
    if bias is not None:
        return ["a gradient is needed, and there is a bias"]
    if q.dtype != torch.float32:
        return [f"a gradient is needed, and q is {q.dtype}"]
    return [] if len(k) == len(q) else ["a gradient is needed, and keys are shared by the batch"]


# ``Attention`` and ``AttentionGradients`` of csrc/cpu/attention.h.
_ARGUMENTS = struct.Struct("@9P 9q 7q 6q d 3i")
_OF_GRADIENTS = struct.Struct("@10P 15q 5q d i")


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
    return _untrained(q, k, v, bias) if checks.needs_gradient(q, k, v, bias) else []


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D], and the log-sum-exp [B, H, Sq] where it is to be saved, else [0]."""
    batch, queries, heads, _ = q.shape
    if bias is not None:
        bias = bias.float().expand(batch, heads, queries, k.shape[1])
    lse = q.new_empty((batch, heads, queries) if save_lse else 0, dtype=torch.float32)
    out = _run(q, k, v, scale, bias, key_lengths, (k.shape[1],), None, lse)
    return out, lse


def in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[int],
    weights: Tensor,
    scale: float,
    key_lengths: Tensor | None,
) -> Tensor:
    """The sum of attention to each part of the keys, see :mod:`..decoupled_attention`."""
    weights = weights.float().expand(len(q), -1, q.shape[1])
    return _run(q, k, v, scale, None, key_lengths, parts, weights)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    parts: Sequence[int],
    weights: Tensor | None,
    lse: Tensor | None = None,
) -> Tensor:
    """Call the kernel: bias [B, H, Sq, Sk] and weights [B, parts - 1, Sq] are of float32."""
    q, k, v = [one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v)]
    out = q.new_empty(q.shape)
    if key_lengths is not None:
        key_lengths = key_lengths.long().contiguous()
    counts = array("q", parts)
    lse = None if lse is None or not lse.numel() else lse
    pointers = (0 if value is None else value.data_ptr() for value in (q, k, v, out, lse, bias))
    arguments = _ARGUMENTS.pack(
        *pointers,
        0 if key_lengths is None else key_lengths.data_ptr(),
        counts.buffer_info()[0],
        0 if weights is None else weights.data_ptr(),
        *(n for value in (q, k, v) for n in value.expand(len(q), -1, -1, -1).stride()[:3]),
        *((0,) * 4 if bias is None else bias.stride()),
        *((0,) * 3 if weights is None else weights.stride()),
        *(len(q), q.shape[2], q.shape[1], k.shape[1], q.shape[3], len(counts)),
        scale,
        *(DTYPES[q.dtype], torch.get_num_threads(), WAYS.index(BEST)),
    )
    if library.kernels.attention(arguments):
        raise MemoryError(library.NO_MEMORY)
    return out


def backward_supports(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
) -> list[str]:
    """Why these gradients are not for the kernel; empty if they are."""
    return library.first_order(grad, q, k, v) or _untrained(q, k, v, bias)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by q, k and v, contiguous, and an empty one by the bias that there isn't."""
    given = [one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v, out, grad)]
    lse = lse.contiguous()
    dq, dk, dv = (value.new_empty(value.shape) for value in (q, k, v))
    if key_lengths is not None:
        key_lengths = key_lengths.long().contiguous()
    arguments = _OF_GRADIENTS.pack(
        *(value.data_ptr() for value in (*given, lse)),
        0 if key_lengths is None else key_lengths.data_ptr(),
        *(value.data_ptr() for value in (dq, dk, dv)),
        *(n for value in given for n in value.stride()[:3]),
        *(len(q), q.shape[2], q.shape[1], k.shape[1], q.shape[3]),
        *(scale, torch.get_num_threads()),
    )
    if library.kernels.attention_gradients(arguments):
        raise MemoryError(library.NO_MEMORY)
    return dq, dk, dv, q.new_empty(0)
