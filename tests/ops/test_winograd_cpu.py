"""Winograd's convolution: values by the rule, at any size, with everything that follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.kernels.layout import format_of

pytestmark = needs_cpu_kernels
LAST, PLAIN = torch.channels_last, torch.contiguous_format


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    both = x if x2 is None else torch.cat((x, x2), 1)
    y = F.conv2d(F.pad(both, padding), weight, bias)
    y = y if add is None else y + add[..., None, None]
    return y if residual is None else y + residual


def packed(weight: Tensor, x: Tensor, padding: Any = 1) -> Any:
    with ops.use_backend(conv2d="cpu"):
        return ops.pack_conv2d(weight, (len(x), weight.shape[1], *x.shape[2:]), padding=padding)


def check(
    x: Tensor, weight: Tensor, padding: tuple[int, int, int, int], pack: bool = True, **more: Any
) -> Tensor:
    made = packed(weight, x, padding) if pack else None
    with ops.use_backend(conv2d="cpu"):
        result = ops.conv2d(x, weight, padding=padding, packed=made, **more)
    double = {name: None if one is None else one.double() for name, one in more.items()}
    truth = plain(x.double(), weight.double(), padding=padding, **double)
    assert_close(result, truth, plain(x, weight, padding=padding, **more))
    return result


@settings(deadline=None, max_examples=80)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    channels=st.tuples(st.integers(1, 40), st.integers(0, 20), st.integers(1, 150)),
    padding=st.tuples(*[st.integers(1, 3)] * 4),
    names=st.sets(st.sampled_from(("bias", "add", "residual"))),
    layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
    shared=st.booleans(),
    pack=st.booleans(),
)
def test_any_call(
    size: tuple[int, int, int],
    channels: tuple[int, int, int],
    padding: tuple[int, int, int, int],
    names: set[str],
    layout: str,
    shared: bool,
    pack: bool,
) -> None:
    batch, height, width = size
    first, second, out = channels

    def image(count: int, height: int, width: int) -> Tensor:
        if layout == "sliced":
            return torch.randn(batch, count, height, 2 * width + 1)[..., 1::2]
        x = torch.randn(batch, count, height, width)
        return x.contiguous(memory_format=LAST) if layout == "channels_last" else x

    after = height + padding[2] + padding[3] - 2, width + padding[0] + padding[1] - 2
    more = {
        "bias": torch.randn(2 * out)[::2],
        "add": torch.randn(1, out).expand(batch, -1) if shared else torch.randn(batch, out),
        "residual": image(out, *after),
    }
    x2 = image(second, height, width) if second else None
    weight = torch.randn(out, first + second, 3, 3)
    given = {name: more[name] for name in sorted(names)}
    check(image(first, height, width), weight, padding, pack, x2=x2, **given)


def gradients(x: Tensor, weight: Tensor, bias: Tensor, padding: Any) -> list[Tensor]:
    """By x, weight and bias, for a cotangent that has a mean."""
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias)]
    y = ops.conv2d(*leaves, padding=padding)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    return list(torch.autograd.grad(y, leaves, cotangent.to(y.dtype)))


def check_gradients(x: Tensor, weight: Tensor, padding: tuple[int, int, int, int]) -> None:
    bias = torch.randn(len(weight))
    backends = {"conv2d": "cpu", "conv2d_backward": "cpu"}
    with ops.use_backend(**backends):
        result = gradients(x, weight, bias, padding)
    truth = gradients(x.double(), weight.double(), bias.double(), padding)
    with ops.use_backend("reference"):
        reference = gradients(x, weight, bias, padding)
    for found, true, known in zip(result, truth, reference, strict=True):
        assert_close(found, true, known)
    assert format_of(result[1]) == format_of(weight)


@settings(deadline=None, max_examples=80)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13)),
    channels=st.tuples(st.integers(1, 50), st.integers(1, 150)),
    padding=st.tuples(*[st.integers(1, 4)] * 4),
    layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
    weight_last=st.booleans(),
)
def test_gradients_of_any_call(
    size: tuple[int, int, int],
    channels: tuple[int, int],
    padding: tuple[int, int, int, int],
    layout: str,
    weight_last: bool,
) -> None:
    batch, height, width = size
    x = torch.randn(batch, channels[0], height, 2 * width)[..., ::2]
    weight = torch.randn(channels[1], channels[0], 3, 3)
    if layout != "sliced":
        x = x.contiguous(memory_format=LAST if layout == "channels_last" else PLAIN)
    if weight_last:
        weight = weight.contiguous(memory_format=LAST)
    check_gradients(x, weight, padding)


@pytest.mark.parametrize("size", [(2, 96, 18, 22), (33, 40, 8, 8), (1, 320, 16, 16)], ids=str)
def test_gradients_over_several_chunks_of_tiles(size: tuple[int, ...]) -> None:
    x = torch.randn(size).contiguous(memory_format=LAST)
    check_gradients(x, torch.randn(64, size[1], 3, 3), (1, 1, 1, 1))


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (3, 0, 2, 4)], ids=str)
def test_gradients_with_padding_of_each_side(padding: tuple[int, int, int, int]) -> None:
    check_gradients(torch.randn(2, 20, 7, 8), torch.randn(33, 20, 3, 3), padding)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_that_are_not_needed_are_not_computed(wanted: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(2, 20, 7, 8), torch.randn(33, 20, 3, 3), torch.randn(33)
    found = []
    for backend in ("cpu", "reference"):
        leaves = [x.clone(), weight.clone(), bias.clone()]
        for index in wanted:
            leaves[index].requires_grad_()
        with ops.use_backend(conv2d=backend, conv2d_backward=backend):
            ops.conv2d(*leaves, padding=1).square().sum().backward()
        found.append([one.grad for one in leaves])
    for index, (result, expected) in enumerate(zip(*found, strict=True)):
        assert (result is None) == (expected is None) == (index not in wanted)
        if result is not None:
            torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


def test_a_gradient_of_the_gradient_is_the_definitions() -> None:
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)

    def twice(dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (x, weight)]
        y = ops.conv2d(*leaves, padding=1)
        (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), leaves))

    with ops.use_backend(conv2d="cpu"):
        result = twice(torch.float32)
    for one, truth, reference in zip(
        result, twice(torch.float64), twice(torch.float32), strict=True
    ):
        assert_close(one, truth, reference)


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 1, 0, 1), (2, 0, 1, 3)], ids=str)
def test_padding_of_each_side(padding: tuple[int, int, int, int]) -> None:
    check(torch.randn(2, 20, 7, 8), torch.randn(33, 20, 3, 3), padding)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("channels", [320, 1920])
def test_channels_of_models(channels: int, scale: float) -> None:
    x = scale * torch.randn(2, channels, 5, 4).contiguous(memory_format=LAST)
    result = check(x, torch.randn(96, channels, 3, 3) / channels**0.5, (1, 1, 1, 1))
    assert result.is_contiguous(memory_format=LAST)


@pytest.mark.slow
@pytest.mark.parametrize("side", [(320, 64), (640, 32), (1280, 16), (1920, 9)], ids=str)
def test_a_layer_of_models(side: tuple[int, int]) -> None:
    channels, pixels = side
    x = torch.randn(2, channels, pixels, pixels).contiguous(memory_format=LAST)
    weight, bias = torch.randn(320, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(320)
    residual = torch.randn(2, 320, pixels, pixels).contiguous(memory_format=LAST)
    add = torch.randn(2, 320)
    check(x, weight, (1, 1, 1, 1), bias=bias, residual=residual, add=add)


def test_a_mean_far_from_zero_costs_what_it_costs_the_definition() -> None:
    x = 100 + torch.randn(1, 64, 6, 6)
    check(x, torch.randn(32, 64, 3, 3), (1, 1, 1, 1))


def test_threads_do_not_change_a_bit() -> None:
    x, weight = torch.randn(2, 50, 30, 30), torch.randn(70, 50, 3, 3)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with ops.use_backend(conv2d="cpu"):
                found.append(ops.conv2d(x, weight, padding=1, packed=packed(weight, x)))
                found.append(ops.conv2d(x, weight, padding=1))
                found += gradients(x, weight, torch.ones(70), 1)[:2]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    for number, one in enumerate(found):
        assert torch.equal(one, found[number % 4])


def test_every_backend_takes_a_weight_that_is_packed_for_it() -> None:
    """The others read the weight itself."""
    x, weight = torch.randn(2, 64, 16, 16), torch.randn(64, 64, 3, 3)
    made, truth = packed(weight, x), plain(x.double(), weight.double())
    assert ops.explain("conv2d", x, weight, padding=1, packed=made).backend == "cpu"
    for backend in ("reference", "onednn"):
        with ops.use_backend(conv2d=backend):
            result = ops.conv2d(
                x, weight, padding=1, packed=made, residual=torch.zeros(1).expand(2, 64, 16, 16)
            )
        assert_close(result, truth, plain(x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 2}, "for windows of 3x3 and stride 1"),
        ({"weight": torch.ones(4, 4, 2, 2)}, "for windows of 3x3 and stride 1"),
        (
            {"weight": torch.ones(4, 4, 3, 3).double(), "x": torch.ones(1, 4, 5, 5).double()},
            "dtype",
        ),
    ],
)
def test_calls_that_are_not_its_work(change: dict[str, Any], message: str) -> None:
    x, weight = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3)
    call = {"x": x, "weight": weight, "packed": packed(weight, x)} | change
    if call["weight"].shape != weight.shape:
        call["packed"] = None
    with ops.use_backend(conv2d="cpu"), pytest.raises(ops.BackendError, match=message):
        ops.conv2d(**call)


def test_the_transform_is_16_ninths_of_the_weight() -> None:
    weight = torch.randn(32, 24, 3, 3)
    (made,) = packed(weight, torch.ones(1, 24, 8, 8))
    assert made.nbytes * 9 == weight.nbytes * 16
