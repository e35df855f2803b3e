"""ops.row_statistics: values, gradients, extremes, operator checks and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_close, error
from torch import Tensor

from diffusion_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.diffusion_fast.row_statistics.default


def plain(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The definition, written once more and differently."""
    compute = torch.promote_types(x.dtype, torch.float32)
    variance, mean = torch.var_mean(x.to(compute), dim=-1, correction=0)
    return mean, 1 / torch.sqrt(variance + eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 16), (7,), (2, 3, 2, 33), (4, 1)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0, -1e4], ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    """Also where the rows' means are many standard deviations."""
    value = (torch.randn(shape) + offset).to(dtype)

    def run(cast: torch.dtype, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        x = value.to(cast).requires_grad_()
        out = function(x)
        weights = [torch.linspace(-1, 1 + i, y.numel()).view(y.shape) for i, y in enumerate(out)]
        total = sum((y * w.to(y.dtype)).sum() for y, w in zip(out, weights, strict=True))
        return [*out, *torch.autograd.grad(total, x)]

    truths, plains = run(torch.float64, plain), run(dtype, plain)
    for function in (ops.row_statistics, lambda x: OP(x, 1e-5)):
        for result, truth, ordinary in zip(run(dtype, function), truths, plains, strict=True):
            assert result.dtype == ordinary.dtype
            assert_close(result, truth, ordinary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_thousand_standard_deviations(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 7, 33) * 0.01 + 100).to(dtype)
    mean, rstd = ops.row_statistics(x)
    truth = plain(x.double())
    assert mean.dtype == rstd.dtype == torch.promote_types(dtype, torch.float32)
    assert error(mean, truth[0]) <= 1e-6
    assert error(rstd, truth[1]) <= 1e-5  # E[x^2] - E[x]^2 would have lost all


def test_a_constant_row_has_the_deviation_of_eps() -> None:
    x = torch.full((2, 5), 3.0, dtype=torch.float64, requires_grad=True)
    mean, rstd = ops.row_statistics(x, 1e-4)
    assert_close(mean, torch.full((2,), 3.0).double())
    assert_close(rstd, torch.full((2,), 100.0).double())
    gradient = torch.autograd.grad(rstd.sum(), x)[0]
    assert (gradient == 0).all()


def test_they_are_what_a_product_wants_of_a_layer_norm() -> None:
    x, weight = torch.randn(2, 7, 16), torch.randn(9, 16)
    ones = torch.ones(16)
    result = ops.linear(x, weight, norm=(*ops.row_statistics(x), weight.sum(1)))
    assert_close(result, ops.layer_norm(x, ones, 0 * ones) @ weight.mT, factor=0)


@pytest.mark.parametrize("size", [(0, 8), (2, 0, 8)])
def test_no_rows(size: tuple[int, ...]) -> None:
    assert [y.shape for y in ops.row_statistics(torch.ones(size))] == [size[:-1]] * 2


def test_operator_and_compile() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64).transpose(0, 1).requires_grad_()
    torch.library.opcheck(OP, (x, 1e-5))
    torch.library.opcheck(OP, (x.detach().bfloat16(), 1e-5))
    assert torch.autograd.gradcheck(lambda x: OP(x, 1e-5), (x,))
    compiled = torch.compile(ops.row_statistics, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(x), ops.row_statistics(x), strict=True):
        assert_close(result, expected)
        assert result.is_contiguous()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x: expected shape \[\.\.\., C\] with C of at least 1, got"),
        ({"x": torch.ones(2, 0)}, r"x: expected shape \[\.\.\., C\] with C of at least 1, got"),
        ({"x": torch.ones(2, 8).long()}, "x: expected a floating point dtype"),
        ({"x": torch.ones(2, 8), "eps": -1.0}, "eps: expected a number of at least 0, got -1.0"),
    ],
)
def test_bad_input(call: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.row_statistics(**call)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        ops.row_statistics([1.0])  # type: ignore[arg-type]
