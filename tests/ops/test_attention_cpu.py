"""The C++ attention: values by the rule, for any shape, with a bias and lengths of keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from small_unets import small_config
from torch import Tensor

from diffusion_fast import hardware, ops
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.ops.cpu import attention as on_cpu
from diffusion_fast.ops.cpu import library

pytestmark = needs_cpu_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEEDS = {"pairs": "avx512_bf16", "tiles": "amx_bf16"}  # of the ways of bfloat16


def here(way: str) -> bool:
    has = NEEDS.get(way, "") in ("", *hardware.cpu_flags())
    return has and (way not in NEEDS or library.level() == "AVX512")


def param(way: str) -> Any:
    reason = f"needs {hardware.BFLOAT16.get(NEEDS.get(way, ''))}, and a compiler that knows it"
    marks = pytest.mark.skipif(not here(way), reason=reason)
    return pytest.param(way, marks=marks, id=f"bfloat16 by {way}")


BY_FLOAT32, *BY_OTHERS = (param(way) for way in on_cpu.WAYS)


@pytest.fixture(params=[pytest.param(torch.float32, id="float32"), BY_FLOAT32, *BY_OTHERS])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """float32, and bfloat16 by all ways to compute it."""
    if isinstance(request.param, torch.dtype):
        return request.param
    monkeypatch.setattr(on_cpu, "BEST", request.param)
    return torch.bfloat16


def check(q: Tensor, k: Tensor, v: Tensor, **given: Tensor | float | None) -> Tensor:
    with ops.use_backend(attention="cpu"):
        result = ops.attention(q, k, v, **given)
    with ops.use_backend(attention="reference"):
        plain = ops.attention(q, k, v, **given)
        wide = {n: x.double() if n == "bias" and x is not None else x for n, x in given.items()}
        truth = ops.attention(q.double(), k.double(), v.double(), **wide)
    assert_close(result, truth, plain)
    assert result.is_contiguous()
    return result


@settings(deadline=None, max_examples=80)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 60),
    keys=st.integers(1, 300),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    sliced=st.booleans(),
    bias=st.sampled_from(["none", "full", "keys", "queries", "masked"]),
    lengths=st.booleans(),
    way=st.sampled_from([way for way in on_cpu.WAYS if here(way)]),
)
def test_any_call(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    shared: bool,
    sliced: bool,
    bias: str,
    lengths: bool,
    way: str,
) -> None:
    def made(images: int, length: int) -> Tensor:
        wide = torch.randn(images, length, heads, dim * 2 + 1).to(dtype)
        return wide[..., 1 : dim + 1] if sliced else wide[..., :dim].contiguous()

    q, k, v = (made(batch, queries), *(made(1 if shared else batch, keys) for _ in range(2)))
    shapes = {"full": (batch, heads, queries, keys), "keys": (batch, 1, 1, keys)}
    shapes |= {"queries": (heads, queries, 1), "masked": (queries, keys)}
    added = None if bias == "none" else torch.randn(shapes[bias]).to(dtype)
    if bias == "masked" and added is not None:
        added = added.masked_fill(torch.rand(queries, keys) < 0.5, -math.inf)
        added[0] = -math.inf  # a query that sees no key
    few = torch.randint(1, keys + 1, (batch,)) if lengths else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_cpu, "BEST", way)
        result = check(q, k, v, bias=added, key_lengths=few)
    if bias == "masked":
        assert not result[:, 0].any()


def gradients(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> list[Tensor]:
    leaves = [one.detach().requires_grad_() for one in (q, k, v)]
    out = ops.attention(*leaves, **given)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_gradients(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> None:
    with ops.use_backend(attention="cpu", attention_backward="cpu"):
        result = gradients(q, k, v, **given)
    with ops.use_backend("reference"):
        plain = gradients(q, k, v, **given)
        truth = gradients(q.double(), k.double(), v.double(), **given)
    for one, true, other in zip(result, truth, plain, strict=True):
        assert_close(one, true, other, factor=3)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 150),
    keys=st.integers(2, 150),
    dim=st.integers(1, 70),
    sliced=st.booleans(),
    lengths=st.booleans(),
)
def test_gradients_of_any_call(
    batch: int, heads: int, queries: int, keys: int, dim: int, sliced: bool, lengths: bool
) -> None:
    def made(length: int) -> Tensor:
        wide = torch.randn(batch, length, heads, dim * 2 + 1)
        return wide[..., 1 : dim + 1] if sliced else wide[..., :dim].contiguous()

    few = torch.randint(2, keys + 1, (batch,)) if lengths else None
    check_gradients(made(queries), made(keys), made(keys), key_lengths=few)


def test_a_weight_of_one_key_has_no_gradient() -> None:
    """But for the rounding of two sums of dim products, which cancel."""
    q, k, v = (torch.randn(1, length, 2, 40) for length in (30, 1, 1))
    with ops.use_backend(attention="cpu"):
        _, dq, dk, dv = gradients(q, k, v)
    with ops.use_backend("reference"):
        truth = gradients(q.double(), k.double(), v.double())[-1]
    assert dq.abs().max() < 1e-4 > dk.abs().max()
    assert_close(dv, truth, truth.float())


@pytest.mark.parametrize("dim", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", [77, 600])
def test_gradients_at_head_widths_of_models(dim: int, keys: int) -> None:
    """More keys than go over the queries together, too."""
    q, k, v = (torch.randn(1, length, 2, dim) for length in (130, keys, keys))
    check_gradients(q, k, v)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0, -0.5])
def test_gradients_with_scores_of_any_size(scale: float) -> None:
    q, k, v = (torch.randn(1, length, 2, 16) for length in (50, 201, 201))
    check_gradients(q, k, v, scale=scale)


def test_threads_do_not_change_a_bit_of_a_gradient() -> None:
    q, k = torch.randn(2, 150, 3, 40), torch.randn(2, 301, 3, 40)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with ops.use_backend(attention="cpu", attention_backward="cpu"):
                found.append(gradients(q, k, k))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(5, 7)}, "there is a bias"),
        ({"k": torch.ones(1, 7, 2, 8), "v": torch.ones(1, 7, 2, 8)}, "shared by the batch"),
        ({n: torch.ones(2, 7, 2, 8).bfloat16() for n in "qkv"}, "q is torch.bfloat16"),
    ],
)
def test_gradients_that_are_not_its_work(change: dict[str, Any], message: str) -> None:
    call = {"q": torch.ones(2, 5, 2, 8), "k": torch.ones(2, 7, 2, 8), "v": torch.ones(2, 7, 2, 8)}
    call |= change
    call["q"].requires_grad_()
    with ops.use_backend(attention="cpu"), pytest.raises(ops.BackendError, match=message):
        ops.attention(**call)


def test_a_gradient_of_the_gradient_is_the_definitions() -> None:
    q, k = torch.randn(1, 9, 2, 8), torch.randn(1, 12, 2, 8)

    def twice(dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (q, k)]
        out = ops.attention(leaves[0], leaves[1], leaves[1])
        (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), leaves))

    with ops.use_backend(attention="cpu"):
        result = twice(torch.float32)
    for one, truth, plain in zip(result, twice(torch.float64), twice(torch.float32), strict=True):
        assert_close(one, truth, plain, factor=3)


@pytest.mark.parametrize("dim", [1, 13, 40, 64, 80, 160, 512])
@pytest.mark.parametrize("keys", [1, 77, 333])
def test_head_widths_of_models(dim: int, keys: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 100, 2, dim).to(dtype), torch.randn(2, keys, 2, dim).to(dtype)
    check(q, k, torch.randn_like(k))
    check(q, k, torch.randn_like(k), key_lengths=torch.tensor([keys, keys // 2 + 1]))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, -0.5])
@pytest.mark.parametrize("biased", [False, True])
def test_scores_of_any_size(scale: float, biased: bool, dtype: torch.dtype) -> None:
    q, k = (torch.randn(1, 50, 2, 16) * 3).to(dtype), (torch.randn(1, 201, 2, 16) * 3).to(dtype)
    bias = torch.randn(2, 50, 201).to(dtype) if biased else None
    check(q, k, torch.randn_like(k), scale=scale, bias=bias)


def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 150, 3, 40).to(dtype), torch.randn(1, 301, 3, 40).to(dtype)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with ops.use_backend(attention="cpu"):
                found.append(ops.attention(q, k, k))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_nan_reaches_the_queries_that_see_it(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, length, 2, 8).to(dtype) for length in (20, 30, 30))
    q[0, 3, 1, 2] = math.nan
    with ops.use_backend(attention="cpu"):
        out = ops.attention(q, k, v)
        assert out[0, 3, 1].isnan().all()
        assert out.isnan().sum() == 8
        k[0, 25, 0] = v[0, 25, 0] = math.nan
        seen = ops.attention(q[:, :2], k, v, key_lengths=torch.tensor([25]))
        assert not seen.isnan().any()
        assert ops.attention(q[:, :2], k, v)[:, :, 0].isnan().all()


@pytest.mark.parametrize("lengths", [None, [77, 5]])
def test_several_contexts(lengths: list[int] | None, dtype: torch.dtype) -> None:
    parts, weights = (77, 4, 257), torch.randn(2, 2, 100)
    q, k, v = (torch.randn(2, n, 2, 40).to(dtype) for n in (100, sum(parts), sum(parts)))
    seen = None if lengths is None else torch.tensor(lengths)
    with ops.use_backend(decoupled_attention="cpu"):
        result = ops.decoupled_attention(q, k, v, parts, weights, key_lengths=seen)
    with ops.use_backend("reference"):
        plain = ops.decoupled_attention(q, k, v, parts, weights, key_lengths=seen)
        wide = (one.double() for one in (q, k, v))
        truth = ops.decoupled_attention(*wide, parts, weights.double(), key_lengths=seen)
    assert_close(result, truth, plain)


@pytest.mark.parametrize("way", BY_OTHERS)
def test_a_way_computes_where_it_can(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums are rounded otherwise than in float32; oneDNN's tiles of a thread stay as set."""
    q, w = torch.randn(1, 64, 2, 40).bfloat16(), torch.randn(96, 96).bfloat16()
    monkeypatch.setattr(on_cpu, "BEST", way)
    with ops.use_backend(attention="cpu"):
        before = torch.mm(w, w)
        found = ops.attention(q, q, q)
        assert torch.equal(torch.mm(w, w), before)
        monkeypatch.setattr(on_cpu, "BEST", "float32")
        assert not torch.equal(ops.attention(q, q, q), found)


@pytest.mark.parametrize("way", [BY_FLOAT32, *BY_OTHERS])
def test_a_step_in_bfloat16(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the error that plain PyTorch has in it."""
    monkeypatch.setattr(on_cpu, "BEST", way)
    torch.manual_seed(0)
    model = UNet2DCondition(small_config()).bfloat16().eval().requires_grad_(False)
    given = torch.randn(2, 4, 16, 16).bfloat16(), torch.tensor(7), torch.randn(2, 77, 24).bfloat16()
    with ops.use_backend(attention="cpu"):
        result = model(*given)
    assert ops.explain("attention").last_ran == "cpu"
    with ops.use_backend("reference"):
        plain = model(*given)
        truth = model.double()(given[0].double(), given[1], given[2].double())
    assert_close(result, truth, plain)
