"""The argument checks: numbers of NumPy count as Python's, and come out as them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_fast import ops
from diffusion_fast.ops.dispatch import checks

INTEGERS = (int, np.int8, np.int32, np.int64, np.uint16)
FLOATS = (float, np.float16, np.float32, np.float64)


@given(kind=st.sampled_from(INTEGERS), value=st.integers(1, 100))
def test_integers(kind: Any, value: int) -> None:
    got = checks.positive_int("n", kind(value))
    assert type(got) is int
    assert got == value
    assert checks.finite("n", kind(value)) == value


@given(kind=st.sampled_from(FLOATS), value=st.floats(0, 100))
def test_numbers(kind: Any, value: float) -> None:
    got = checks.not_negative("n", kind(value))
    assert type(got) is float
    assert got == float(kind(value))


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float64(1), "1", None, 0, np.int64(-1)])
def test_what_is_no_positive_integer(value: Any) -> None:
    with pytest.raises(ValueError, match="n: expected a positive integer, got"):
        checks.positive_int("n", value)


@pytest.mark.parametrize("value", ["1", None, float("nan"), np.float32("inf"), 1j, np.ones(2)])
def test_what_is_no_finite_number(value: Any) -> None:
    with pytest.raises(ValueError, match="n: expected a finite number, got"):
        checks.finite("n", value)


def test_every_op_takes_numbers_of_numpy() -> None:
    one, half, x = np.int64(1), np.float32(0.5), torch.randn(2, 4, 6, 6)
    weight, rows = torch.ones(4), torch.randn(3, 4)
    calls = (
        lambda i, f: ops.group_norm_silu(x, i, weight, weight, eps=f),
        lambda i, f: ops.conv2d(x, torch.ones(2, 4, 3, 3), stride=i, padding=i),
        lambda i, f: ops.conv2d(x, torch.ones(2, 4, 3, 3), padding=(i, i, 0, 0)),
        lambda i, f: ops.layer_norm(rows, weight, weight, f),
        lambda i, f: ops.row_statistics(rows, f)[1],
        lambda i, f: ops.residual(x, bias=weight, scale=f, dim=i),
        lambda i, f: ops.attention(*(rows.view(3, 1, 2, 2),) * 3, scale=f),
        lambda i, f: ops.Philox(i, i).normal((4,)),
    )
    for call in calls:
        assert torch.equal(call(one, half), call(1, 0.5))
    assert ops.pack_linear(torch.ones(4, 4, device="meta"), one) is None
