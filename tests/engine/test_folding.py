"""The algebra of derived weights, each formula against the layers that it replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, error
from prepared import LEVELS, randomize
from torch import nn
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.engine.rewrites import folding

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    randomize(made)
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 6)] * 2), channels=st.tuples(*[st.integers(1, 5)] * 2))
def test_upsample(
    memory: torch.memory_format, sizes: tuple[int, int], channels: tuple[int, int]
) -> None:
    conv = layer(nn.Conv2d(*channels, 3, padding=1), torch.float64)
    x = torch.randn(2, channels[0], *sizes, dtype=torch.float64).to(memory_format=memory)
    weight, bias, _ = folding.with_upsample(conv)
    result = folding.interleaved(F.conv2d(x, weight, bias, padding=1))
    assert error(result, conv(F.interpolate(x, scale_factor=2, mode="nearest"))) <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_upsample_in_low_precision(dtype: torch.dtype) -> None:
    conv = layer(nn.Conv2d(64, 32, 3, padding=1), dtype)
    x = torch.randn(2, 64, 8, 8).to(dtype)
    weight, bias, _ = folding.with_upsample(conv)
    result = folding.interleaved(F.conv2d(x, weight, bias, padding=1))
    direct = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    truth = conv.double()(F.interpolate(x.double(), scale_factor=2, mode="nearest"))
    assert_close(result, truth, direct)


def test_interleaving_is_one_copy_in_the_layout_of_its_input() -> None:
    last = torch.randn(1, 8, 3, 4).to(memory_format=torch.channels_last)
    assert folding.interleaved(last).is_contiguous(memory_format=torch.channels_last)
    assert folding.interleaved(last.contiguous()).is_contiguous()


def test_fused() -> None:
    for bias in (True, False):
        layers = [layer(nn.Linear(6, n, bias=bias), torch.float64) for n in (3, 4, 5)]
        x = torch.randn(7, 6, dtype=torch.float64)
        weight, both, _ = folding.fused(*layers)
        expected = torch.cat([one(x) for one in layers], dim=1)
        assert error(F.linear(x, weight, both), expected) <= 1e-14


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 10.0, -10.0], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype: torch.dtype, offset: float, bias: bool, geglu: bool) -> None:
    """Also where the rows' means are ten standard deviations: half precision holds the rule.

    What it rounds away is more than what the difference of two large products loses in float32.
    Single and double precision have nothing to hide that in: they hold the rule without the means,
    and with them the looser bounds of whole networks.
    """
    norm = layer(nn.LayerNorm(64), dtype)
    linear = layer(nn.Linear(64, 96, bias=bias), dtype)
    x = (torch.randn(3, 20, 64) + offset).to(dtype)
    weights = folding.with_layer_norm(folding.Weights(linear.weight, linear.bias), norm)
    rows = ops.row_statistics(x, norm.eps)
    result = ops.linear(
        x, weights.weight, weights.bias, geglu=geglu, norm=(*rows, weights.column_sums)
    )
    plain = linear(norm(x))
    truth = linear.double()(norm.double()(x.double()))
    if geglu:
        plain, truth = ops.geglu(plain), ops.geglu(truth)
    if offset and dtype in LEVELS:
        assert error(result, truth) <= LEVELS[dtype]
    else:
        assert_close(result, truth, plain)


def test_column_sums_are_those_of_the_rounded_weight() -> None:
    """With those of the exact one, ten standard deviations would show."""
    norm, linear = layer(nn.LayerNorm(64), torch.bfloat16), layer(nn.Linear(64, 96), torch.bfloat16)
    weights = folding.with_layer_norm(folding.Weights(linear.weight, linear.bias), norm)
    x = (torch.randn(60, 64) + 10).to(torch.bfloat16)
    rows = ops.row_statistics(x, norm.eps)
    exact = (linear.weight.double() * norm.weight.double()).sum(1).float()
    plain = linear(norm(x))
    truth = linear.double()(norm.double()(x.double()))
    wrong = ops.linear(x, weights.weight, weights.bias, norm=(*rows, exact))
    right = ops.linear(x, weights.weight, weights.bias, norm=(*rows, weights.column_sums))
    assert error(right, truth) <= 2 * error(plain, truth) + 1e-3
    assert error(wrong, truth) > 2 * error(right, truth)
