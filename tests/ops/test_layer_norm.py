"""ops.layer_norm against plain PyTorch, with its registered gradient."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.diffusion_fast.layer_norm.default


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 16), (7,), (2, 3, 2, 33)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], mean: float) -> None:
    values = [(torch.randn(shape) + mean).to(dtype)]
    values += [torch.randn(shape[-1]).to(dtype) for _ in range(2)]

    def run(cast: torch.dtype, function: object) -> list[Tensor]:
        leaves = [v.detach().to(cast).requires_grad_() for v in values]
        out = function(*leaves)
        cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(cast)
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    truths, plains = run(torch.float64, plain), run(dtype, plain)
    for function in (ops.layer_norm, lambda *leaves: OP(*leaves, 1e-5)):
        for result, truth, ordinary in zip(run(dtype, function), truths, plains, strict=True):
            assert_close(result, truth, ordinary)


def test_operator_and_compile() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64).transpose(0, 1).requires_grad_()
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(OP, (x, weight, bias, 1e-5))
    assert torch.autograd.gradcheck(lambda *leaves: OP(*leaves, 1e-5), (x, weight, bias))
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), ops.layer_norm(x, weight, bias))
    assert ops.layer_norm(x, weight, bias).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight: expected shape \[C\] = \[8\], got \[7\]"),
        ({"bias": torch.ones(8).half()}, "bias: expected the dtype of x"),
        ({"bias": torch.ones(8, device="meta")}, "bias: expected the device of x"),
        ({"x": torch.tensor(1.0)}, r"x: expected shape \[\.\.\., C\]"),
        ({"x": torch.ones(2, 8).long()}, "x: expected a floating point dtype"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    call = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8)} | change
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(**call)
