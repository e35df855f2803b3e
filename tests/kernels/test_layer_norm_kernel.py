"""The LayerNorm kernel, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check, randn
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import layer_norm as kernel

GRADIENTS = ("x", "weight", "bias")


def inputs(
    size: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous"
) -> dict[str, Tensor]:
    values = {"x": randn(*size, dtype=dtype, layout=layout)}
    return values | {n: randn(size[-1], dtype=dtype) for n in ("weight", "bias")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("size", [(2, 7, 40), (3, 77), (37, 320), (2, 1280)])
def test_values_and_gradients(dtype: torch.dtype, layout: str, size: tuple[int, ...]) -> None:
    check(lambda **v: ops.layer_norm(**v), inputs(size, dtype, layout), GRADIENTS)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(size=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_any_shape(size: list[int]) -> None:
    values = inputs((*size, size[0] + 1), torch.float32)
    check(lambda **v: ops.layer_norm(**v), values, GRADIENTS)


def test_the_same_bits_every_time() -> None:
    values = inputs((2, 40, 33), torch.float32)
    check(lambda **v: ops.layer_norm(**v), values, GRADIENTS, repeat=True)


def test_more_rows_than_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stripe walks several tiles, and the last one is cut short."""
    monkeypatch.setattr(kernel, "STRIPES", 4)
    values = inputs((203, 3), torch.float32)
    check(lambda **v: ops.layer_norm(**v), values, GRADIENTS)


@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e4, 1.0), (-3e3, 1e-1), (0.0, 1e-18), (1e15, 1e12)]
)
def test_extreme_magnitudes(mean: float, deviation: float) -> None:
    values = inputs((4, 320), torch.float32)
    values["x"] = values["x"] * deviation + mean
    check(lambda **v: ops.layer_norm(**v), values)


def test_rows_of_a_larger_tensor_are_read_in_place() -> None:
    values = inputs((6, 16), torch.float32) | {"x": randn(6, 50, dtype=torch.float32)[:, 7:23]}
    check(lambda **v: ops.layer_norm(**v), values, GRADIENTS)


@pytest.mark.parametrize("size", [(0, 8), (2, 0, 8)])
def test_nothing_to_do(size: tuple[int, ...]) -> None:
    values = {n: v.requires_grad_() for n, v in inputs(size, torch.float32).items()}
    with ops.use_backend("triton"):
        gradients = torch.autograd.grad(ops.layer_norm(**values).sum(), list(values.values()))
    assert all((g == 0).all() for g in gradients)


def test_operator_and_compile() -> None:
    values = {n: v.requires_grad_() for n, v in inputs((3, 5, 7), torch.float64).items()}
    with ops.use_backend("triton"):
        op = torch.ops.diffusion_fast.layer_norm.default
        torch.library.opcheck(op, (*values.values(), 1e-5))
        compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**values), ops.layer_norm(**values))


def test_a_row_too_long_for_a_block_is_refused() -> None:
    x, one = torch.ones(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="more than 16384"):
        ops.layer_norm(x, one, one)
