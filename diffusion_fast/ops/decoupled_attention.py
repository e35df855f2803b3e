"""Decoupled attention: to several contexts in one call, each with a softmax of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .attention import CONTEST, attention, check_inputs
from .cpu import attention as on_cpu
from .cpu import library as cpu
from .dispatch import Op, autocast, checks, triton
from .dispatch.backend import requested


def decoupled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[int],
    weights: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attention to a text and, beside it, to images (Ye et al. 2023, arXiv:2308.06721, eq. 5).

    attention(q, k_0, v_0) + sum_i w_i attention(q, k_i, v_i), never one softmax over all keys.

    Args:
        q: [B, Sq, H, D].
        k, v: [B or 1, Sk, H, D]: those of all contexts, one behind the other.
        parts: how many of the Sk keys each context has; at least one context.
        weights: how much the contexts behind the first count, [B or 1, len(parts) - 1, Sq or 1], in
            the dtype of ``q`` or float32: read from the tensor at every call.
        scale: factor of the scores; 1 / sqrt(D) by default.
        key_lengths: int32 or int64 [B], values in [1, parts[0]]: item b sees the first
            key_lengths[b] keys of the first context, and all of the others.

    Returns:
        [B, Sq, H, D], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, parts that don't add up to Sk,
            lengths out of range (values are read on the host for CPU tensors only).

    Examples:
        >>> q, k, v = torch.randn(2, 64, 8, 40), *torch.randn(2, 2, 81, 8, 40)
        >>> weights = torch.tensor([[[0.5]]])
        >>> out = df.ops.decoupled_attention(q, k, v, (77, 4), weights)
        >>> text = df.ops.attention(q, k[:, :77], v[:, :77])
        >>> image = df.ops.attention(q, k[:, 77:], v[:, 77:])
        >>> torch.allclose(out, text + 0.5 * image, atol=1e-5)
        True
    """
    if scale is None and isinstance(q, Tensor) and q.dim():
        scale = 1 / math.sqrt(q.shape[-1] or 1)
    return _OP(q, k, v, parts, weights, scale, key_lengths)


def _cast(q: Tensor, k: Any, v: Any, parts: Any, weights: Any, *rest: Any) -> autocast.Policy:
    q, k, v, weights = autocast.cast(q.device, q, k, v, weights)
    return (q, k, v, parts, weights, *rest), None


def _check_values(
    q: Any, k: Any, v: Any, parts: Sequence[int], weights: Any, scale: Any, key_lengths: Any
) -> None:
    if key_lengths is not None:
        checks.values_between("key_lengths", key_lengths, 1, parts[0], f"[1, {parts[0]}]")


def _check(q: Any, k: Any, v: Any, parts: Any, weights: Any, scale: Any, key_lengths: Any) -> None:
    check_inputs(q, k, v, scale, None, key_lengths, False)
    if not isinstance(parts, (list, tuple)):
        checks.fail("parts", "a list or tuple of numbers of keys", parts)
    for count in parts:
        checks.whole("parts", count, "numbers of keys of at least 1", 1)
    if sum(parts) != k.shape[1]:
        checks.fail("parts", f"numbers of keys that add up to the {k.shape[1]} of k", list(parts))
    checks.floating("weights", weights)
    checks.same_device("weights", weights, "q", q)
    if weights.dtype not in (q.dtype, torch.float32):
        checks.fail("weights", f"dtype {q.dtype} or torch.float32", weights.dtype)
    (batch, queries), others = q.shape[:2], len(parts) - 1
    fits = weights.dim() == 3 and weights.shape[1] == others
    if not fits or len(weights) not in (1, batch) or weights.shape[2] not in (1, queries):
        expected = f"[{batch} or 1, {others}, {queries} or 1]"
        checks.fail(
            "weights", f"shape [B or 1, parts - 1, Sq or 1] = {expected}", list(weights.shape)
        )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[int],
    weights: Tensor,
    scale: float,
    key_lengths: Tensor | None,
) -> Tensor:
    """A call of attention for each context, by whatever backend that has."""
    (k, *keys), (v, *values) = k.split(list(parts), 1), v.split(list(parts), 1)
    out = attention(q, k, v, scale=scale, key_lengths=key_lengths)
    factors = weights.to(q.dtype).unbind(1)  # [B or 1, Sq or 1] each
    for k, v, factor in zip(keys, values, factors, strict=True):
        out = torch.addcmul(out, attention(q, k, v, scale=scale), factor[..., None, None])
    return out


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_OP = Op(
    "decoupled_attention",
    reference,
    _fake,
    public=decoupled_attention,
    check=_check,
    values=_check_values,
    policy=_cast,
)


def _slower(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[int], weights: Tensor, scale: float, *_: Any
) -> list[str]:
    """Why "auto" leaves the contexts to calls of their own: another way won their contest."""
    if requested("decoupled_attention") != "auto":
        return []
    return CONTEST.slower(cpu.NAME)(q, k, v, scale, None)


def _kernels() -> ModuleType:
    from ..kernels import decoupled_attention

    return decoupled_attention


def _fits(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[int], weights: Tensor, *_: Any
) -> list[str]:
    """Why this call is not for the kernel of Triton, whose programs are bounded."""
    why = []
    if q.shape[-1] > 256:
        why.append(f"a head dim of {q.shape[-1]}, more than 256")
    if len(parts) > 16:
        why.append(f"{len(parts)} contexts, more than 16")
    return why


CONTEST.decides(_OP)
cpu.add(_OP, lambda: on_cpu.in_parts, slower=_slower, forward_only=True)
triton.add(_OP, _kernels, _fits, measured=True, forward_only=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.parts, weights, ctx.scale, key_lengths = inputs
    ctx.save_for_backward(q, k, v, weights, key_lengths)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of each context's attention, which is computed once more, times its weight."""
    q, k, v, weights, key_lengths = ctx.saved_tensors
    ours, parts = torch.ops.diffusion_fast, list(ctx.parts)
    dq, dk, dv, dweights = torch.zeros_like(q), [], [], []
    for i, (key, value) in enumerate(zip(k.split(parts, 1), v.split(parts, 1), strict=True)):
        given, lengths = grad, key_lengths
        out, lse = ours.attention(q, key, value, ctx.scale, None, None if i else lengths, True)
        if i:
            given = grad * weights[:, i - 1, :, None, None].to(grad.dtype)
            dweights.append((grad * out).sum((2, 3)))  # [B, Sq]
            lengths = None
        made = ours.attention_backward(given, q, key, value, out, lse, ctx.scale, None, lengths)
        dq = dq + made[0]
        dk.append(made[1])
        dv.append(made[2])
    dfactors = torch.zeros_like(weights)
    if dweights:
        dfactors = torch.stack(dweights, 1).sum_to_size(weights.shape).to(weights.dtype)
    return dq, torch.cat(dk, 1), torch.cat(dv, 1), None, dfactors, None, None


_OP.autograd(_setup_context, _backward)
