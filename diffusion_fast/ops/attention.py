"""softmax(scale * Q K^T + bias) V, in the layout a projection produces: [B, S, H, D]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import attention_onednn, onednn
from .cpu import attention as on_cpu
from .cpu import library as cpu
from .cpu.contest import Contest, Ways
from .cuda import attention as attention_cuda
from .cuda.contest import Contest as GpuContest
from .dispatch import Backend, Op, autocast, checks
from .dispatch.backend import requested


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), not causal.

    Args:
        q: [B, Sq, H, D]; unlike PyTorch's SDPA the heads come after the sequence, so that a
            projection's output is used as it is.
        k, v: [B, Sk, H, D], or [1, Sk, H, D] for one prompt shared by the batch.
        scale: factor of the scores; 1 / sqrt(D) by default.
        bias: what is added to the scaled scores, broadcastable to [B, H, Sq, Sk], in the dtype of
            ``q`` or float32.
        key_lengths: int32 or int64 [B], values in [1, Sk]: item b sees its first
            key_lengths[b] keys.

    A query whose keys are all masked, by a bias of -inf, gets zeros and passes no gradient on.

    Under autocast the tensors are cast to its dtype, as PyTorch's SDPA casts them.

    Returns:
        [B, Sq, H, D], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, no keys, a head dim of 0, lengths
            out of range (values are read on the host for CPU tensors only).

    Examples:
        >>> q = torch.randn(2, 64, 8, 40)
        >>> k, v = torch.randn(2, 77, 8, 40), torch.randn(2, 77, 8, 40)
        >>> df.ops.attention(q, k, v).shape
        torch.Size([2, 64, 8, 40])
        >>> short = df.ops.attention(q, k, v, key_lengths=torch.tensor([77, 5]))
        >>> torch.allclose(short[1:], df.ops.attention(q[1:], k[1:, :5], v[1:, :5]), atol=1e-5)
        True
    """
    if scale is None and isinstance(q, Tensor) and q.dim():
        scale = 1 / math.sqrt(q.shape[-1] or 1)
    out, _ = _OP(q, k, v, scale, bias, key_lengths, False)
    return out


def _recorded(q: Any, k: Any, v: Any, scale: Any, bias: Any, key_lengths: Any, _: bool) -> Any:
    """The registered gradient needs the log-sum-exp."""
    return q, k, v, scale, bias, key_lengths, True


def _cast(q: Tensor, k: Any, v: Any, scale: Any, bias: Any, *rest: Any) -> autocast.Policy:
    q, k, v, bias = autocast.cast(q.device, q, k, v, bias)
    return (q, k, v, scale, bias, *rest), None


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, scale: Any, bias: Any, key_lengths: Any, _: bool
) -> None:
    if key_lengths is not None:
        keys = k.shape[1]
        checks.values_between("key_lengths", key_lengths, 1, keys, f"[1, {keys}]")


def check_inputs(
    q: Any, k: Any, v: Any, scale: Any, bias: Any, key_lengths: Any, save_lse: bool
) -> None:
    tensors = {"q": q, "k": k, "v": v}
    checks.together(tensors)
    for name, value in tensors.items():
        if value.dim() != 4:
            checks.fail(name, "shape [B, S, H, D]", list(value.shape))
    batch, queries, heads, dim = q.shape
    if dim == 0:
        checks.fail("q", "a head dim of at least 1", 0)
    keys = k.shape[1]
    if keys == 0:
        checks.fail("k", "at least one key", list(k.shape))
    if k.shape[0] not in (1, batch) or k.shape[2:] != (heads, dim):
        checks.fail(
            "k", f"shape [B or 1, Sk, H, D] = [{batch} or 1, Sk, {heads}, {dim}]", list(k.shape)
        )
    checks.shape("v", v, k.shape, "of k")
    checks.finite("scale", scale)
    if bias is not None:
        checks.floating("bias", bias)
        checks.same_device("bias", bias, "q", q)
        full = (batch, heads, queries, keys)
        padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if bias.dim() > 4 or any(n not in (1, m) for n, m in zip(padded, full, strict=True)):
            checks.fail(
                "bias",
                f"a shape that broadcasts to [B, H, Sq, Sk] = {list(full)}",
                list(bias.shape),
            )
        if bias.dtype not in (q.dtype, torch.float32):
            checks.fail("bias", f"dtype {q.dtype} or torch.float32", bias.dtype)
    if key_lengths is not None:
        checks.tensor("key_lengths", key_lengths)
        if key_lengths.dtype not in (torch.int32, torch.int64):
            checks.fail("key_lengths", "dtype torch.int32 or torch.int64", key_lengths.dtype)
        checks.shape("key_lengths", key_lengths, (batch,), "[B]")
        checks.same_device("key_lengths", key_lengths, "q", q)


def _mask(
    q: Tensor, k: Tensor, bias: Tensor | None, key_lengths: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores: bias, and -inf past each item's last key."""
    mask = bias.to(dtype) if bias is not None else None
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if key_lengths is None:
        return mask
    hidden = torch.arange(k.shape[1], device=q.device) >= key_lengths[:, None]  # [B, Sk]
    if mask is None:
        mask = torch.zeros((), dtype=dtype, device=q.device)
    return mask.masked_fill(hidden[:, None, None], float("-inf"))


def _scores(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, Sq, Sk], at least float32 after the product, and which queries see no key.

    These are bool [B or 1, H or 1, Sq or 1, 1], or None without a mask. Their scores are 0, as -inf
    alone in a row would make NaN of it.
    """
    batch, queries, heads, _ = q.shape
    product = torch.bmm(_by_head(q, batch), _by_head(k, batch).mT)
    scores = product.view(batch, heads, queries, k.shape[1]).to(_statistics(q)) * scale
    mask = _mask(q, k, bias, key_lengths, scores.dtype)
    if mask is None:
        return scores, None
    blind = (mask == -math.inf).all(-1, keepdim=True)
    return (scores + mask).masked_fill(blind, 0.0), blind


def _by_head(x: Tensor, batch: int) -> Tensor:
    """[B or 1, S, H, D] as [B * H, S, D], for one product of matrices that is many.

    An einsum would take half as many nodes again of the backward pass: what small calls cost.
    """
    x = x if x.shape[0] == batch else x.expand(batch, -1, -1, -1)
    return x.transpose(1, 2).flatten(0, 1)


def _where_seen(value: Tensor, blind: Tensor | None, other: float = 0.0) -> Tensor:
    """``value`` [B, H, Sq, ...], and ``other`` for queries that see no key."""
    return value if blind is None else value.masked_fill(blind, other)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    scores, blind = _scores(q, k, scale, bias, key_lengths)
    weights = _where_seen(torch.softmax(scores, dim=-1), blind).to(q.dtype)
    out = torch.bmm(weights.flatten(0, 1), _by_head(v, len(weights)))
    out = out.view(*weights.shape[:3], q.shape[3]).transpose(1, 2)
    return out.contiguous(), _lse(scores, blind) if save_lse else scores.new_empty(0)


def _statistics(q: Tensor) -> torch.dtype:
    """Of scores and log-sum-exp."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _lse(scores: Tensor, blind: Tensor | None) -> Tensor:
    """log sum exp of the scores, [B, H, Sq], natural logarithm; -inf where no key is seen."""
    return _where_seen(torch.logsumexp(scores, dim=-1, keepdim=True), blind, -math.inf)[..., 0]


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own scaled_dot_product_attention, which picks among its backends."""
    batch = q.shape[0]
    if k.shape[0] != batch:
        k, v = k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = _mask(q, k, bias, key_lengths, q.dtype)
    if mask is not None:
        mask = mask.expand(batch, q.shape[2], q.shape[1], k.shape[1])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if save_lse:
        lse = _lse(*_scores(q, k, scale, bias, key_lengths))
    else:
        lse = torch.empty(0, dtype=_statistics(q), device=q.device)
    return out.transpose(1, 2).contiguous(), lse


def reference_backward(
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
    """Gradients of q, k, v and bias (empty without one).

    With P = exp(scores - lse) and delta = rowsum(grad * out): dS = P * (grad V^T - delta).
    """
    compute = _statistics(q)
    batch = q.shape[0]
    scores, blind = _scores(q, k, scale, bias, key_lengths)
    again = checks.needs_gradient(grad, q, k, v, bias)
    if again:  # the one that is saved has no gradient of its own
        lse = _lse(scores, blind)
    weights = _where_seen(torch.exp(scores - lse[..., None]), blind)  # [B, H, Sq, Sk]
    grad, value = grad.to(compute), v.to(compute).expand(batch, -1, -1, -1)
    dweights = torch.einsum("bqhd,bkhd->bhqk", grad, value)
    if again:
        delta = (weights * dweights).sum(-1, keepdim=True)
    else:
        delta = (grad * out.to(compute)).sum(-1).transpose(1, 2)[..., None]  # [B, H, Sq, 1]
    dscores = weights * (dweights - delta)
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k.to(compute).expand(batch, -1, -1, -1)) * scale
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q.to(compute)) * scale
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, grad)
    return (
        dq.to(q.dtype).contiguous(),
        dk.sum_to_size(k.shape).to(k.dtype).contiguous(),
        dv.sum_to_size(v.shape).to(v.dtype).contiguous(),
        q.new_empty(0)
        if bias is None
        else dscores.sum_to_size((1,) * (4 - bias.dim()) + tuple(bias.shape))
        .reshape(bias.shape)
        .to(bias.dtype)
        .contiguous(),
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    shape = (batch, heads, queries) if rest[-1] else (0,)
    lse = q.new_empty(shape, dtype=_statistics(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    bias = rest[1]
    like = torch.empty_like
    dense = torch.contiguous_format
    return (
        *(like(value, memory_format=dense) for value in (q, k, v)),
        q.new_empty(0) if bias is None else like(bias, memory_format=dense),
    )


def _sdpa_supports(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, *_: Any
) -> list[str]:
    if forward_ad._current_level >= 0:
        return ["SDPA's kernels have no forward-mode AD"]
    if bias is not None and bias.dtype != q.dtype:
        return [f"the bias is {bias.dtype} and SDPA would round it to {q.dtype}"]
    return []


# Scores of a head up to which PyTorch's definition has the cheaper backward pass on a CPU: at 64
# by 64 in bfloat16 five times, at 64 by 20 more; at 256 by 256 SDPA's is 1.6 times as fast.
SHORT = 64 * 64


def _sdpa_trains(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, *_: Any
) -> list[str]:
    """Why "auto" leaves a call to the definition."""
    short = q.is_cpu and q.shape[1] * k.shape[1] <= SHORT and requested("attention") == "auto"
    if short and checks.needs_gradient(q, k, v, bias):
        return [f"a gradient is needed, and its own is slow up to {SHORT:,} scores on a CPU"]
    return []


# PyTorch's kernels that compete with those of csrc/ on a GPU.
_RIVALS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def _by_rival(rival: SDPBackend) -> Any:
    def run(*args: Any) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(rival):
            return sdpa(*args)

    return run


_WAYS = GpuContest(
    "attention",
    {"own": attention_cuda.forward, "hopper": attention_cuda.hopper}
    | {name: _by_rival(rival) for name, rival in _RIVALS.items()},
)


def _contested(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    """Whether the clock decides: with a gradient or its log-sum-exp our kernels have no rival."""
    auto = q.is_cuda and requested("attention") == "auto"
    return auto and not rest[-1] and not checks.needs_gradient(q, k, v, rest[1])


def _on_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    hopper = _contested(*args) and _WAYS.known(args) == "hopper"
    return _WAYS.ways["hopper" if hopper else "own"](*args)


def _sdpa(*args: Any) -> tuple[Tensor, Tensor]:
    best = _WAYS.known(args) if _contested(*args) else None
    return (_WAYS.ways[best] if best in _RIVALS else sdpa)(*args)


def _lost(best: str) -> list[str]:
    return [f"{best} was measured faster at this shape"] if best in _RIVALS else []


def _ready(*args: Any) -> list[str]:
    why = attention_cuda.ready(*args)
    return why or (_lost(_WAYS.choose(args)) if _contested(*args) else [])


def _foresee(*args: Any) -> list[str] | None:
    why = attention_cuda.foresee(*args)
    if why or not _contested(*args):
        return why
    best = _WAYS.known(args)
    return None if best is None else _lost(best)


_OP = Op(
    "attention",
    reference,
    _fake,
    public=attention,
    check=check_inputs,
    values=_check_values,
    policy=_cast,
    recorded=_recorded,
)
_BACKWARD = Op("attention_backward", reference_backward, _fake_backward)
_OP.add(
    Backend(
        "sdpa",
        lambda: _sdpa,
        supports=_sdpa_supports,
        ready=_sdpa_trains,
        foresee=_sdpa_trains,
        composite=True,
    )
)
CONTEST = Contest(_OP, on_cpu.kind_of, on_cpu.example, always=on_cpu.KINDS)


def _with_gradients(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """A way to attention and its gradients through autograd, by arguments of the backward op."""

    @torch.enable_grad()
    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        leaves = [value.detach().requires_grad_() for value in (q, k, v)]
        return torch.autograd.grad(forward(*leaves, *rest[2:], False)[0], leaves, grad)

    return run


def _on_cpu_with_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Any,
    lse: Any,
    scale: float,
    bias: Any,
    key_lengths: Tensor | None,
) -> Any:
    out, lse = on_cpu.forward(q, k, v, scale, bias, key_lengths, True)
    return on_cpu.backward(grad, q, k, v, out, lse, scale, bias, key_lengths)[:3]


def _training_ways(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> Ways:
    usual = {"sdpa": _with_gradients(sdpa)}
    if q.shape[1] * k.shape[1] <= SHORT:
        usual = {"reference": _with_gradients(reference)}
    return usual | {cpu.NAME: _on_cpu_with_gradients}


_TRAINING = Contest(
    *(_BACKWARD, on_cpu.training_kind_of, on_cpu.training_example), ways=_training_ways
)
_TRAINING.decides(_OP)
_lost_forward = CONTEST.slower(cpu.NAME)
_lost_with_gradients = _TRAINING.slower(
    cpu.NAME,
    otherwise="sdpa",
    kind_of=lambda q, k, v, _, bias, *__: on_cpu.training_kind(q, k, v, bias),
)


def _slower_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, *rest: Any
) -> list[str]:
    """Why "auto" doesn't take the kernel for a CPU; with a gradient, both of its kernels."""
    if requested("attention") != "auto":
        return []
    trains = checks.needs_gradient(q, k, v, bias)
    return (_lost_with_gradients if trains else _lost_forward)(q, k, v, scale, bias, *rest)


_OP.add(
    Backend(
        "onednn",
        lambda: attention_onednn.forward,
        onednn.machine,
        attention_onednn.supports,
        CONTEST.slower("onednn"),
        CONTEST.slower("onednn"),
        forward_only=True,
    )
)
cpu.add(_OP, lambda: on_cpu.forward, on_cpu.supports, _slower_on_cpu)
cpu.add(_BACKWARD, lambda: on_cpu.backward, on_cpu.backward_supports)
_OP.add(
    Backend(
        "cuda",
        lambda: _on_cuda,
        attention_cuda.machine,
        attention_cuda.supports,
        _ready,
        _foresee,
    )
)
_BACKWARD.add(attention_cuda.BACKWARD)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, bias, key_lengths, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, bias, key_lengths)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bias, key_lengths = ctx.saved_tensors
    dq, dk, dv, dbias = _BACKWARD(grad, q, k, v, out, lse, ctx.scale, bias, key_lengths)
    return dq, dk, dv, None, dbias if bias is not None else None, None, None


_OP.autograd(_setup_context, _backward)
