"""ops.residual: the definition, its gradient, layouts, operator checks and errors."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast import ops

OP = torch.ops.diffusion_fast.residual.default
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plain(x: Tensor, residual: Tensor, bias: Tensor, scale: float, dim: int) -> Tensor:
    return (x.transpose(dim, -1) + bias).transpose(dim, -1).add(residual) * scale


def inputs(dtype: torch.dtype, dim: int) -> list[Tensor]:
    x, residual = torch.randn(2, 3, 4, 5, 6).to(dtype)
    return [x, residual, torch.randn(x.shape[dim]).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 3, -1])
def test_values_and_gradients(dtype: torch.dtype, dim: int) -> None:
    values = inputs(dtype, dim)

    def run(kind: str) -> list[Tensor]:
        cast = torch.float64 if kind == "truth" else dtype
        leaves = [v.to(cast).requires_grad_() for v in values]
        y = OP(*leaves, 0.7, dim % 4) if kind == "op" else plain(*leaves, 0.7, dim)
        cotangent = torch.linspace(-1, 2, y.numel()).view(y.shape).to(cast)
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    for result, truth, ordinary in zip(*map(run, ("op", "truth", "plain")), strict=True):
        assert_close(result, truth, ordinary)


@pytest.mark.parametrize("names", [(), ("residual",), ("bias",), ("residual", "bias")])
def test_what_is_missing_adds_nothing(names: tuple[str, ...]) -> None:
    x, residual, bias = inputs(torch.float64, 1)
    given = {n: v for n, v in {"residual": residual, "bias": bias}.items() if n in names}
    zeros = {"residual": torch.zeros_like(x), "bias": torch.zeros_like(bias)}
    truth = plain(x, *(zeros | given).values(), 2.0, 1)
    assert_close(ops.residual(x, **given, scale=2.0), truth)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_x_stays(layout: torch.memory_format) -> None:
    x, residual, bias = inputs(torch.float32, 1)
    y = ops.residual(x.contiguous(memory_format=layout), residual, bias)
    assert y.is_contiguous(memory_format=layout)


def test_operator() -> None:
    values = [v.requires_grad_() for v in inputs(torch.float64, 1)]
    torch.library.opcheck(OP, (*values, 0.5, 1))
    torch.library.opcheck(OP, (values[0], None, None, 0.5, 0))
    assert torch.autograd.gradcheck(lambda *v: OP(*v, 0.5, 1), values)


def test_compiles_and_exports_whole() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
            return ops.residual(x, residual, bias, scale=0.5)

    values = inputs(torch.float32, 1)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*values), Block()(*values))
    assert "diffusion_fast.residual" in str(torch.export.export(Block(), tuple(values)).graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3).int()}, "x: expected a floating point dtype"),
        ({"residual": torch.ones(2, 4)}, r"residual: expected shape of x = \[2, 3\], got \[2, 4\]"),
        ({"residual": torch.ones(2, 3).half()}, "residual: expected the dtype of x"),
        ({"bias": torch.ones(2)}, r"bias: expected shape \[C\] = \[3\], got \[2\]"),
        ({"bias": torch.ones(3).half()}, "bias: expected the dtype of x"),
        ({"bias": torch.ones(3), "dim": 2}, r"dim: expected a dimension of x \[2, 3\], got 2"),
        ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.residual(**({"x": torch.ones(2, 3)} | change))
