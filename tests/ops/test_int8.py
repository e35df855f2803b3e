"""Products in int8: against their definition in whole numbers, and what rounding may cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast.ops import int8

needs_vnni = pytest.mark.skipif(bool(int8.machine()), reason=" ".join(int8.machine()))
LAST = torch.channels_last
# Of a product of normal inputs and weights: rounding both to 8 bits measured 0.9 to 1.4 %.
MOST = 0.02


def whole(x: Tensor) -> tuple[Tensor, float]:
    """An item's q - z as float64 integers, and its scale."""
    q, scale, zero = int8.rounded(x)
    return q.double() - zero, scale


def ended(y: Tensor, geglu: bool, residual: Tensor | None) -> Tensor:
    if geglu:
        value, gate = y.chunk(2, -1)
        y = value * F.gelu(gate)
    return y if residual is None else y + residual.to(y.dtype)


def linear_of(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Any, **ends: Any) -> Tensor:
    """s s_n sum (q - z) k + b, the sums exact in float64 and all else in ``dtype``."""
    k, scales = int8.rounded_weight(weight)
    items = []
    for item in x:
        numbers, scale = whole(item)
        sums = F.linear(numbers, k.double()).to(dtype)
        items.append(sums * (scale * scales.to(dtype)))
    y = torch.stack(items)
    return ended(y if bias is None else y + bias.to(dtype), **ends)


def conv2d_of(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Any, add: Any, residual: Any, **window: Any
) -> Tensor:
    k, scales = int8.rounded_weight(weight)
    items = []
    for item in x.split(1):
        numbers, scale = whole(item)
        sums = F.conv2d(numbers, k.double(), **window).to(dtype)
        items.append(sums * (scale * scales.to(dtype))[:, None, None])
    y = torch.cat(items)
    y = y if bias is None else y + bias.to(dtype)[:, None, None]
    y = y if add is None else y + add.to(dtype)[..., None, None]
    return y if residual is None else y + residual.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **ends: Any) -> Tensor:
    packed = int8.pack_linear(weight, x[..., 0].numel(), geglu=ends.get("geglu", False))
    return int8.linear(x, weight, bias, packed=packed, **ends)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **what: Any) -> Tensor:
    window = {name: what[name] for name in ("stride", "padding") if name in what}
    channels = x.shape[1] + (what["x2"].shape[1] if what.get("x2") is not None else 0)
    packed = int8.pack_conv2d(weight, (len(x), channels, *x.shape[2:]), **window)
    return int8.conv2d(x, weight, bias, packed=packed, **what)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    rows=st.sampled_from([7, 64, 77]),
    inner=st.sampled_from([1, 5, 32, 96, 320]),
    out=st.sampled_from([10, 64, 160]),
    middle=st.floats(-3, 3),
    biased=st.booleans(),
    geglu=st.booleans(),
    added=st.booleans(),
)
@needs_vnni
def test_a_product_is_its_definition(
    batch: int,
    rows: int,
    inner: int,
    out: int,
    middle: float,
    biased: bool,
    geglu: bool,
    added: bool,
) -> None:
    x, weight = torch.randn(batch, rows, inner) + middle, torch.randn(out, inner)
    bias = torch.randn(out) if biased else None
    residual = torch.randn(batch, rows, out // (1 + geglu)) if added else None
    result = linear(x, weight, bias, geglu=geglu, residual=residual)
    ends = {"geglu": geglu, "residual": residual}
    truth = linear_of(torch.float64, x, weight, bias, **ends)
    assert_close(result, truth, linear_of(torch.float32, x, weight, bias, **ends))
    assert result.is_contiguous()


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([2, 8, 30, 64]),
    out=st.sampled_from([1, 16, 40]),
    size=st.sampled_from([(8, 8), (5, 9), (3, 3)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    middle=st.floats(-3, 3),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    last=st.booleans(),
)
@needs_vnni
def test_a_convolution_is_its_definition(
    batch: int,
    channels: int,
    out: int,
    size: tuple[int, int],
    stride: int,
    padding: int,
    middle: float,
    given: tuple[bool, bool, bool],
    last: bool,
) -> None:
    form = LAST if last else torch.contiguous_format
    x = (torch.randn(batch, channels, *size) + middle).contiguous(memory_format=form)
    weight, window = torch.randn(out, channels, 3, 3), {"stride": stride, "padding": padding}
    made = F.conv2d(x, weight, **window)
    values = torch.randn(out), torch.randn(batch, out), torch.randn_like(made)
    bias, add, residual = (value if has else None for value, has in zip(values, given, strict=True))
    result = conv2d(x, weight, bias, add=add, residual=residual, **window)
    truth = conv2d_of(torch.float64, x, weight, bias, add, residual, **window)
    plain = conv2d_of(torch.float32, x, weight, bias, add, residual, **window)
    assert_close(result, truth, plain)
    assert result.is_contiguous(memory_format=form)


@pytest.mark.parametrize("low", [0, -100, -127, -254])
@needs_vnni
def test_sums_are_exact(low: int) -> None:
    """Whole numbers that 8 bits hold, at their limits: none is rounded, no sum saturates."""
    x = torch.randint(low, low + 255, (2, 50, 512)).float()
    x[..., :2] = torch.tensor([low, low + 254]).float()
    x[0, 0] = low + 254
    weight = torch.randint(-127, 128, (40, 512)).float()
    weight[:, 0] = 127
    weight[0] = 127
    expected = x.long() @ weight.long().T
    assert expected.abs().max() < 2**24
    assert torch.equal(linear(x, weight).long(), expected)
    image = x.view(2, 50, 8, 64).permute(0, 3, 1, 2)  # [2, 64, 50, 8]
    kernel = weight[:32, : 64 * 8].reshape(32, 64, 2, 4)
    assert torch.equal(
        conv2d(image, kernel, padding=1), F.conv2d(image.double(), kernel.double(), padding=1)
    )


@settings(deadline=None, max_examples=100)
@given(
    low=st.floats(-(2.0**100), 2.0**100),
    span=st.floats(0, 2.0**100),
    seed=st.integers(0, 2**31),
)
def test_an_input_is_rounded_to_its_nearest_step(low: float, span: float, seed: int) -> None:
    noise = torch.rand(5, 77, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (low + span * noise).float()
    q, scale, zero = int8.rounded(x)
    assert q.dtype == torch.uint8
    assert 0 <= zero <= 255
    assert scale * (q.double() - zero) == pytest.approx(x.double(), abs=0.5001 * scale, rel=0)
    assert scale <= max((max(x.max().item(), 0) - min(x.min().item(), 0)) / 254, int8.LEAST)


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-38, 3.0, -3.0, 3e38, -3e38])
def test_an_input_of_one_number(value: float) -> None:
    q, scale, zero = int8.rounded(torch.full((2, 3), value))
    assert scale * (q.double() - zero) == pytest.approx(
        torch.full((2, 3), value, dtype=torch.float64), abs=max(0.5001 * scale, 1e-30)
    )


def test_a_weight_is_rounded_by_its_outputs() -> None:
    weight = torch.randn(6, 4, 3, 3) * 10.0 ** torch.arange(-3, 3)[:, None, None, None]
    weight[2] = 0
    k, scales = int8.rounded_weight(weight)
    assert k.abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127, 127, 127]
    off = (k * scales[:, None, None, None] - weight).abs().amax((1, 2, 3))
    assert (off <= 0.5001 * scales).all()


@needs_vnni
def test_what_rounding_costs() -> None:
    """A scale or a zero point that is wrong by a step of 255 is far beyond it."""
    x, weight = torch.randn(2, 64, 320) + 0.5, torch.randn(320, 320)
    for result, exact in (
        (linear(x, weight), F.linear(x, weight)),
        (
            conv2d(x.mT.view(2, 320, 8, 8), weight.view(320, 320, 1, 1)),
            F.linear(x, weight).mT.view(2, 320, 8, 8),
        ),
    ):
        off = (result - exact).norm() / exact.norm()
        assert 1e-3 < off < MOST


@needs_vnni
def test_items_of_a_batch_do_not_see_each_other() -> None:
    x = torch.randn(3, 16, 64) * torch.tensor([1, 100, 1e-3])[:, None, None]
    weight, bias = torch.randn(32, 64), torch.randn(32)
    image, kernel = x.view(3, 16, 8, 8), torch.randn(8, 16, 3, 3)
    together, conved = linear(x, weight, bias), conv2d(image, kernel, padding=1)
    for i in range(3):
        assert torch.equal(together[i : i + 1], linear(x[i : i + 1], weight, bias))
        assert torch.equal(conved[i : i + 1], conv2d(image[i : i + 1], kernel, padding=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@needs_vnni
def test_an_item_that_is_not_finite_is_nan_and_no_other(value: float) -> None:
    x, weight, kernel = torch.randn(2, 4, 9), torch.randn(6, 9), torch.randn(5, 4, 3, 3)
    x[1, 2, 3] = value
    for result in (
        linear(x, weight),
        linear(x, weight, geglu=True),
        conv2d(x.view(2, 4, 3, 3), kernel, padding=1),
    ):
        assert result[0].isfinite().all()
        assert result[1].isnan().all()


@needs_vnni
def test_two_sources_are_one() -> None:
    x, x2, kernel = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6), torch.randn(5, 7, 3, 3)
    assert torch.equal(conv2d(x, kernel, x2=x2), conv2d(torch.cat((x, x2), 1), kernel))


@needs_vnni
def test_half_precision_is_computed_in_float32_and_given_back() -> None:
    x, weight = torch.randn(2, 8, 32).bfloat16(), torch.randn(16, 32)
    result = linear(x, weight, residual=torch.ones(2, 8, 16).bfloat16())
    assert torch.equal(result, (linear(x.float(), weight) + 1).bfloat16())


def test_shapes_without_data() -> None:
    x, weight = torch.empty(2, 8, 32, device="meta"), torch.empty(16, 32, device="meta")
    assert int8.pack_linear(weight, 16) is None
    assert int8.linear(x, weight, None, packed=None, geglu=True).shape == (2, 8, 8)
    image, kernel = x.view(2, 8, 8, 4), torch.empty(6, 8, 3, 3, device="meta")
    assert int8.pack_conv2d(kernel, (2, 8, 8, 4), padding=1) is None
    y = int8.conv2d(image, kernel, None, packed=None, stride=2, padding=1)
    assert y.shape == (2, 6, 4, 2)


def test_where_it_can_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert int8.supports(gpu, torch.float32) == ["a model on cuda:1"]
    assert int8.supports(cpu, torch.bfloat16) == ["a model in torch.bfloat16"]
    for flags, why in (({"avx512f"}, ["this CPU has no VNNI"]), ({"avx_vnni"}, [])):
        monkeypatch.setattr(int8, "cpu_flags", lambda flags=flags: frozenset(flags))
        int8.machine.cache_clear()
        assert int8.supports(cpu, torch.float32) == why
    monkeypatch.setattr(int8, "OPERATORS", ("qlinear_nowhere",))
    int8.machine.cache_clear()
    assert int8.machine() == ["this PyTorch has no torch.ops.onednn.qlinear_nowhere"]
    monkeypatch.undo()
    int8.machine.cache_clear()
