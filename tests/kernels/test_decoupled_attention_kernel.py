"""The kernel of attention to several contexts: layouts, widths, lengths, weights, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, HALF, check, randn
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import decoupled_attention, launch

WIDTHS = (1, 8, 13, 40, 64, 80, 160, 256)


def case(
    parts: tuple[int, ...],
    dtype: torch.dtype,
    queries: int = 70,
    heads: int = 3,
    dim: int = 40,
    batch: int = 2,
    weights: tuple[int, int] = (1, 1),
    shared: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """A call and its tensors; ``weights``: their sizes of batch and queries."""
    keys = (1 if shared else batch, sum(parts), heads, dim)
    values = {
        "q": randn(batch, queries, heads, dim, dtype=dtype),
        "k": randn(*keys, dtype=dtype),
        "v": randn(*keys, dtype=dtype),
        "weights": randn(weights[0], len(parts) - 1, weights[1], dtype=dtype),
    }

    def call(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, **more: Tensor) -> Tensor:
        return ops.decoupled_attention(q, k, v, parts, weights, **more)

    return call, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(77, 4), (5,), (40, 1, 16, 33)], ids=str)
@pytest.mark.parametrize("lengths", [None, torch.int32, torch.int64], ids=str)
def test_values(dtype: torch.dtype, parts: tuple[int, ...], lengths: torch.dtype | None) -> None:
    call, values = case(parts, dtype)
    if lengths is not None:
        values["key_lengths"] = torch.tensor([parts[0], 3], dtype=lengths, device=DEVICE)
    check(call, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", WIDTHS)
def test_widths(dtype: torch.dtype, dim: int) -> None:
    check(*case((35, 4), dtype, queries=19, heads=2, dim=dim))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("wide", [False, True], ids=["as q", "float32"])
def test_weights(batch: int, queries: int, wide: bool) -> None:
    """For all images or each, for all queries or each (a mask), and of strides of their own."""
    call, values = case((9, 4, 5), torch.bfloat16, weights=(batch, queries))
    if wide:
        values["weights"] = values["weights"].float()
    check(call, values)
    check(call, values | {"weights": values["weights"].mT.contiguous().mT})
    check(call, values | {"weights": torch.zeros_like(values["weights"])})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_views_are_read_in_place(
    dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values as halves of one product, queries as a third of one."""
    call, values = case((19, 4), dtype, shared=shared)
    keys, (batch, queries, heads, dim) = len(values["k"]), values["q"].shape
    both = randn(keys, 23, 2 * heads * dim, dtype=dtype)
    k, v = (half.unflatten(-1, (heads, dim)) for half in both.chunk(2, -1))
    q = randn(batch, queries, 3 * heads * dim, dtype=dtype)[..., : heads * dim]
    views = {"q": q.unflatten(-1, (heads, dim)), "k": k, "v": v}
    monkeypatch.setattr(Tensor, "contiguous", lambda *_: pytest.fail("a copy is made"))
    with ops.use_backend("triton"):
        seen = call(**values | views)
    monkeypatch.undo()
    check(call, values | views)
    assert torch.equal(seen, call_by_kernel(call, values | views))


def call_by_kernel(call: Any, values: dict[str, Tensor]) -> Tensor:
    with ops.use_backend("triton"):
        result: Tensor = call(**values)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_before_positions_and_odd_strides(dtype: torch.dtype) -> None:
    call, values = case((19, 4), dtype, dim=8)
    heads_first = {n: values[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    check(call, values | heads_first)
    odd = {n: randn(*values[n].shape, dtype=dtype, layout="sliced") for n in "qkv"}
    check(call, values | odd)


@settings(deadline=None, max_examples=30)
@given(
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 16, 63, 64, 65, 130]),
    heads=st.integers(1, 3),
    dim=st.integers(1, 48),
    dtype=st.sampled_from(DTYPES),
    lengths=st.booleans(),
    shared=st.booleans(),
    mask=st.booleans(),
    data=st.data(),
)
def test_any_call(
    parts: tuple[int, ...],
    batch: int,
    queries: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    lengths: bool,
    shared: bool,
    mask: bool,
    data: st.DataObject,
) -> None:
    weights = (data.draw(st.sampled_from([1, batch])), queries if mask else 1)
    call, values = case(parts, dtype, queries, heads, dim, batch, weights, shared)
    if lengths:
        values["key_lengths"] = torch.randint(1, parts[0] + 1, (batch,), device=DEVICE)
    check(call, values)


@pytest.mark.parametrize("dtype", HALF)
def test_large_scores(dtype: torch.dtype) -> None:
    """A softmax that is one key's alone, far above others: nothing overflows on the way."""
    call, values = case((40, 33), dtype)
    check(call, values | {"q": 60 * values["q"]})


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program for tensors of more than 2^31 elements, on small ones."""
    call, values = case((40, 4), torch.float32, weights=(2, 70))
    values["key_lengths"] = torch.tensor([40, 7], device=DEVICE)
    expected = call_by_kernel(call, values)
    monkeypatch.setattr(launch, "wide", lambda *_: True)
    assert torch.equal(call_by_kernel(call, values), expected)


@pytest.mark.parametrize("size", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
def test_nothing_to_do(size: tuple[int, ...]) -> None:
    q, keys = torch.ones(size, device=DEVICE), torch.ones(size[0], 5, *size[2:], device=DEVICE)
    weights = torch.ones(1, 1, 1, device=DEVICE)
    with ops.use_backend("triton"):
        assert ops.decoupled_attention(q, keys, keys, (3, 2), weights).shape == size


@pytest.mark.parametrize(
    ("parts", "dim", "why"),
    [
        ((2,) * 17, 8, "17 contexts, more than 16"),
        ((3, 2), 257, "a head dim of 257, more than 256"),
    ],
)
def test_what_it_refuses(parts: tuple[int, ...], dim: int, why: str) -> None:
    call, values = case(parts, torch.float32, queries=2, dim=dim)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match=why):
        call(**values)


def test_the_most_contexts() -> None:
    check(*case((3,) * 16, torch.float32, queries=5, heads=1))


def test_gradients_are_not_its_own() -> None:
    call, values = case((3, 2), torch.float32, queries=2)
    values["weights"].requires_grad_()
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="a gradient is needed"):
        call(**values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_tiles_fit_the_width(dtype: torch.dtype, width: int) -> None:
    """Two blocks of keys and values beside the queries, in the memory of a consumer GPU."""
    tile = decoupled_attention.config(dtype, width)
    held = tile.m + 2 * tile.n * tile.stages
    assert held * width * dtype.itemsize <= 99 * 1024
    assert min(tile.m, tile.n) >= 16
