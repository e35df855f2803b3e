"""Attention to several contexts in one call: values, gradients, the kernel's too, and errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, error
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops.cpu import library
from diffusion_fast.ops.dispatch import known_ops, measured, triton

# Whether Triton's kernels run here on tensors of the CPU.
INTERPRETED = not triton.machine() and not torch.cuda.is_available()
OP = torch.ops.diffusion_fast.decoupled_attention.default


def plain(
    q: Tensor, k: Tensor, v: Tensor, parts: Any, weights: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The definition, with the softmaxes written out over masked scores."""
    keys = torch.arange(k.shape[1])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.expand(len(q), -1, -1, -1))
    scores = scores * q.shape[-1] ** -0.5
    total, first = torch.zeros_like(scores), 0
    for i, count in enumerate(parts):
        own = (keys >= first) & (keys < first + count)
        seen = own if i or lengths is None else own & (keys < lengths[:, None])
        hidden = ~seen if seen.dim() == 1 else ~seen[:, None, None]
        part = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        total = total + (part * weights[:, i - 1, None, :, None] if i else part)
        first += count
    return torch.einsum("bhqk,bkhd->bqhd", total, v.expand(len(q), -1, -1, -1))


def drawn(parts: Any, batch: int = 2, queries: int = 7, dim: int = 8, **how: Any) -> list[Any]:
    q = torch.randn(batch, queries, 3, dim, **how)
    k, v = torch.randn(2, batch, sum(parts), 3, dim, **how)
    return [q, k, v, tuple(parts), torch.randn(batch, len(parts) - 1, queries, **how)]


def cast(call: list[Any], dtype: torch.dtype) -> list[Any]:
    return [one.to(dtype) if isinstance(one, Tensor) else one for one in call]


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.one_of(st.integers(1, 20), st.integers(100, 300)), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    queries=st.sampled_from([1, 5, 47, 100]),
    dim=st.sampled_from([1, 8, 13, 40]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    lengths=st.booleans(),
    shared=st.booleans(),
    everywhere=st.booleans(),
    backend=st.sampled_from(["auto", "reference", "cpu", "triton"]),
)
def test_any_call(
    parts: list[int],
    batch: int,
    queries: int,
    dim: int,
    dtype: torch.dtype,
    lengths: bool,
    shared: bool,
    everywhere: bool,
    backend: str,
) -> None:
    if backend == "cpu" and (dtype == torch.float64 or library.machine()):
        backend = "auto"
    if backend == "triton" and (dtype == torch.bfloat16 or not INTERPRETED):
        backend = "auto"  # the interpreter truncates to bfloat16, which tests/kernels allows for
    call = cast(drawn(parts, batch, queries, dim), dtype)
    if shared:
        call[1:3] = [one[:1] for one in call[1:3]]
    if everywhere:
        call[4] = call[4][:1, :, :1]
    seen = torch.randint(1, parts[0] + 1, (batch,)) if lengths else None
    with ops.use_backend(decoupled_attention=backend):
        result = ops.decoupled_attention(*call, key_lengths=seen)
        if backend != "auto":
            assert ops.explain("decoupled_attention").last_ran == backend
    assert result.is_contiguous()
    assert result.dtype == dtype
    truth = plain(*cast(call, torch.float64), lengths=seen)
    with ops.use_backend("reference"):
        ordinary = ops.decoupled_attention(*call, key_lengths=seen)
    assert_close(result, truth, ordinary)


def test_it_is_not_one_softmax() -> None:
    """Nor a weight of the scores: what is added is as large as its weight, whatever the text is."""
    call = drawn((5, 4), dtype=torch.float64)
    text = ops.attention(call[0], call[1][:, :5], call[2][:, :5])
    one, two = (ops.decoupled_attention(*call[:4], call[4] * n) for n in (1, 2))
    assert_close(two - text, 2 * (one - text))
    assert error(ops.attention(*call[:3]), one) > 0.1
    call[4] = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert_close(ops.decoupled_attention(*call), text)


@needs_cpu_kernels
def test_the_kernel_reads_weights_and_lengths_anew() -> None:
    """They are data: the same tensors with other numbers in them."""
    call, seen = drawn((77, 4, 16)), torch.tensor([77, 3])
    with ops.use_backend(decoupled_attention="cpu"):
        for scale, length in ((1.0, 5), (0.3, 9)):
            call[4].mul_(scale)
            seen[1] = length
            truth = plain(*cast(call, torch.float64), lengths=seen)
            assert_close(
                ops.decoupled_attention(*call, key_lengths=seen), truth, plain(*call, lengths=seen)
            )
        expected = ops.decoupled_attention(*call)
        call[4] = call[4].mT.contiguous().mT
        assert torch.equal(ops.decoupled_attention(*call), expected)


@needs_cpu_kernels
def test_what_the_kernel_leaves_alone() -> None:
    call = drawn((5, 4))
    with ops.use_backend(decoupled_attention="cpu"):
        call[4].requires_grad_()
        with pytest.raises(ops.BackendError, match="a gradient is needed"):
            ops.decoupled_attention(*call)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("why", [[], [measured.SLOWER]], ids=["faster", "slower"])
def test_the_clock_decides_on_a_gpu(why: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors were on one: the kernel runs where it was measured to be faster."""
    call = drawn((5, 4))
    truth = plain(*cast(call, torch.float64))
    monkeypatch.setattr(triton, "tensors_fit", lambda op, args: [])
    monkeypatch.setattr(measured, "known", lambda *_: None)
    monkeypatch.setattr(measured, "ask", lambda *_: why)
    known_ops["decoupled_attention"].forget()
    try:
        later = ops.explain("decoupled_attention", *call)
        result = ops.decoupled_attention(*call)
    finally:
        known_ops["decoupled_attention"].forget()
    assert later.backend == "decided at the first call"
    assert (ops.explain("decoupled_attention").last_ran == "triton") == (not why)
    assert_close(result, truth, plain(*call))


@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients(everywhere: bool) -> None:
    """Of the eager call, and of the operator that a compiler sees."""
    call = drawn((3, 2, 1), queries=4, dtype=torch.float64)
    if everywhere:
        call[4] = call[4][:1, :, :1].contiguous()
    inputs = [one.requires_grad_() for one in call if isinstance(one, Tensor)]
    seen = torch.tensor([3, 2])

    def eager(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return ops.decoupled_attention(q, k, v, (3, 2, 1), weights, key_lengths=seen)

    def operator(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return OP(q, k, v, (3, 2, 1), weights, 8**-0.5, seen)

    assert torch.autograd.gradcheck(eager, inputs)
    assert torch.autograd.gradcheck(operator, inputs)


def test_operator_and_compile() -> None:
    call = drawn((3, 2))
    torch.library.opcheck(OP, (*call, 0.3, None))
    grown = [one.requires_grad_() if isinstance(one, Tensor) else one for one in call]
    torch.library.opcheck(OP, (*grown, 0.3, torch.tensor([1, 3])))
    compiled = torch.compile(ops.decoupled_attention, fullgraph=True, backend="aot_eager")
    result, expected = compiled(*call), ops.decoupled_attention(*call)
    assert_close(result, expected.double(), expected)
    for mine, theirs in zip(
        torch.autograd.grad(result.square().sum(), [call[0], call[4]]),
        torch.autograd.grad(expected.square().sum(), [call[0], call[4]]),
        strict=True,
    ):
        assert_close(mine, theirs.double(), theirs)


BAD: dict[str, dict[str, Any]] = {
    "parts: expected numbers of keys that add up to the 9 of k, got [5, 3]": {"parts": (5, 3)},
    "parts: expected numbers of keys of at least 1, got 0": {"parts": (9, 0)},
    "parts: expected a list or tuple of numbers of keys, got 9": {"parts": 9},
    "weights: expected shape [B or 1, parts - 1, Sq or 1] = [2 or 1, 1, 7 or 1], got [2, 2, 7]": {
        "weights": torch.ones(2, 2, 7)
    },
    "weights: expected dtype torch.float32 or torch.float32, got torch.float64": {
        "weights": torch.ones(2, 1, 7).double()
    },
    "key_lengths: expected": {"key_lengths": torch.tensor([6, 1])},
    "v: expected shape": {"v": torch.ones(2, 8, 3, 8)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    names = ("q", "k", "v", "parts", "weights")
    call = dict(zip(names, drawn((5, 4)), strict=True)) | BAD[message]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ops.decoupled_attention(**call)
