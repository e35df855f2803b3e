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


def test_a_gradient_is_not_its_work() -> None:
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    with (
        ops.use_backend(attention="cpu"),
        pytest.raises(ops.BackendError, match="a gradient is needed"),
    ):
        ops.attention(q, q, q)
    assert torch.autograd.grad(ops.attention(q, q, q).sum(), q)[0].isfinite().all()


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
