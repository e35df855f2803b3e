"""The GEGLU kernel, forward and backward."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, check, randn

from diffusion_fast import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("size", [(2, 5, 12), (6,), (1, 3, 2, 46), (3, 2100), (2, 0), (0, 4)])
def test_values_and_gradients(dtype: torch.dtype, layout: str, size: tuple[int, ...]) -> None:
    values = {"x": randn(*size, dtype=dtype, layout=layout)}
    check(ops.geglu, values, ("x",), repeat=size == (2, 5, 12))


@pytest.mark.parametrize("scale", [1e-20, 30.0, 1e18])
def test_extreme_magnitudes(scale: float) -> None:
    """Both tails of the normal distribution, and products at the ends of the range."""
    check(ops.geglu, {"x": randn(3, 64, dtype=torch.float32) * scale}, ("x",))


def test_rows_of_a_larger_tensor_are_read_in_place() -> None:
    check(ops.geglu, {"x": randn(6, 50, dtype=torch.float32)[:, 7:23]}, ("x",))


def test_operator_and_compile() -> None:
    x = randn(3, 5, 8, dtype=torch.float64).requires_grad_()
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.diffusion_fast.geglu.default, (x,))
        compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), ops.geglu(x))
