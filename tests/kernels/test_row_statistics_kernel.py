"""The kernel of a row's mean and deviation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check, randn

from diffusion_fast import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("size", [(2, 7, 40), (3, 77), (37, 320), (2, 1280)])
def test_values(dtype: torch.dtype, layout: str, size: tuple[int, ...]) -> None:
    check(lambda x: ops.row_statistics(x), {"x": randn(*size, dtype=dtype, layout=layout)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [10.0, -100.0])
def test_means_of_many_standard_deviations(dtype: torch.dtype, offset: float) -> None:
    x = (torch.randn(40, 320, device=DEVICE) + offset).to(dtype)
    check(lambda x: ops.row_statistics(x), {"x": x})


@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e4, 1.0), (-3e3, 1e-1), (0.0, 1e-18), (1e15, 1e12)]
)
def test_extreme_magnitudes(mean: float, deviation: float) -> None:
    x = randn(4, 320, dtype=torch.float32) * deviation + mean
    check(lambda x: ops.row_statistics(x), {"x": x})


@settings(deadline=None, max_examples=12, derandomize=True)
@given(size=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_any_shape(size: list[int]) -> None:
    check(lambda x: ops.row_statistics(x), {"x": randn(*size, dtype=torch.float32)}, ("x",))


def test_the_same_bits_every_time() -> None:
    x = randn(2, 40, 33, dtype=torch.float32)
    check(lambda x: ops.row_statistics(x), {"x": x}, ("x",), repeat=True)


def test_rows_of_a_larger_tensor_are_read_in_place() -> None:
    check(lambda x: ops.row_statistics(x), {"x": randn(6, 50, dtype=torch.float32)[:, 7:23]})


@pytest.mark.parametrize("size", [(0, 8), (2, 0, 8)])
def test_nothing_to_do(size: tuple[int, ...]) -> None:
    with ops.use_backend("triton"):
        assert [y.shape for y in ops.row_statistics(torch.ones(size, device=DEVICE))] == [
            size[:-1]
        ] * 2


def test_operator_and_compile() -> None:
    x = randn(3, 5, 7, dtype=torch.float64).requires_grad_()
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.diffusion_fast.row_statistics.default, (x, 1e-5))
        compiled = torch.compile(ops.row_statistics, fullgraph=True, backend="aot_eager")
        for result, expected in zip(compiled(x), ops.row_statistics(x), strict=True):
            assert torch.equal(result, expected)


def test_a_row_too_long_for_a_block_is_refused() -> None:
    x = torch.ones(1, 16385, device=DEVICE)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="more than 16384"):
        ops.row_statistics(x)
