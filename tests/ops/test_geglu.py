"""ops.geglu against plain PyTorch, with its registered gradient."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.diffusion_fast.geglu.default


def plain(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., :half] * F.gelu(x[..., half:])


def exact(x: Tensor) -> Tensor:
    """In float64; PyTorch's own gelu loses the tail there, where 1 + erf cancels."""
    value, gate = x.chunk(2, -1)
    return value * gate * 0.5 * torch.erfc(-gate * 0.5**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 16), (2,), (0, 4), (2, 3, 2, 34)])
@pytest.mark.parametrize("magnitude", [1.0, 30.0])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], magnitude: float) -> None:
    x = (torch.randn(shape) * magnitude).to(dtype)

    def run(cast: torch.dtype, function: object) -> list[Tensor]:
        leaf = x.detach().to(cast).requires_grad_()
        out = function(leaf)
        cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(cast)
        return [out, *torch.autograd.grad(out, leaf, cotangent)]

    truths, plains = run(torch.float64, exact), run(dtype, plain)
    for function in (ops.geglu, OP):
        for result, truth, ordinary in zip(run(dtype, function), truths, plains, strict=True):
            assert_close(result, truth, ordinary)


def test_operator_and_compile() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OP, (x,))
    assert torch.autograd.gradcheck(OP, (x,))
    compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.geglu(x))


@pytest.mark.parametrize("x", [torch.ones(2, 7), torch.tensor(1.0), torch.ones(2, 8).int()])
def test_bad_input(x: Tensor) -> None:
    with pytest.raises(ValueError, match="x: expected"):
        ops.geglu(x)
