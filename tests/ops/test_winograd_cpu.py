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

pytestmark = needs_cpu_kernels
LAST = torch.channels_last


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


def check(x: Tensor, weight: Tensor, padding: tuple[int, int, int, int], **more: Any) -> Tensor:
    made = packed(weight, x, padding)
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
)
def test_any_call(
    size: tuple[int, int, int],
    channels: tuple[int, int, int],
    padding: tuple[int, int, int, int],
    names: set[str],
    layout: str,
    shared: bool,
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
    check(image(first, height, width), weight, padding, x2=x2, **given)


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
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


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
        ({"packed": None}, "not packed for it"),
        ({"bias": torch.ones(4, requires_grad=True)}, "a gradient is needed"),
    ],
)
def test_calls_that_are_not_its_work(change: dict[str, Any], message: str) -> None:
    x, weight = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3)
    call = {"x": x, "weight": weight, "packed": packed(weight, x)} | change
    with ops.use_backend(conv2d="cpu"), pytest.raises(ops.BackendError, match=message):
        ops.conv2d(**call)


def test_the_transform_is_16_ninths_of_the_weight() -> None:
    weight = torch.randn(32, 24, 3, 3)
    (made,) = packed(weight, torch.ones(1, 24, 8, 8))
    assert made.nbytes * 9 == weight.nbytes * 16
