"""ops.weighted_mse against plain PyTorch, with its registered gradient."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.diffusion_fast.weighted_mse.default


def plain(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    square = (prediction - target) ** 2
    if weight is not None:
        square = square * weight.reshape(-1, *[1] * (square.dim() - 1))
    return square.mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (4,)])
def test_values_and_gradients(dtype: torch.dtype, weighted: bool, shape: tuple[int, ...]) -> None:
    values = [torch.randn(shape).to(dtype) for _ in range(2)]
    if weighted:
        values.append(torch.rand(shape[0]).to(dtype))

    def run(cast: torch.dtype, function: object) -> list[Tensor]:
        leaves = [v.detach().to(cast).requires_grad_() for v in values]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves)]

    def operator(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return OP(prediction, target, weight)

    truths, plains = run(torch.float64, plain), run(dtype, plain)
    for function in (ops.weighted_mse, operator):
        for result, truth, ordinary in zip(run(dtype, function), truths, plains, strict=True):
            assert_close(result, truth, ordinary)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((4, 4096), 100.0, dtype=torch.float16)
    loss = ops.weighted_mse(x, torch.zeros_like(x))
    assert loss.dtype == torch.float32
    assert loss.item() == 1e4


@pytest.mark.parametrize("weighted", [False, True])
def test_operator_and_compile(weighted: bool) -> None:
    prediction, target = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in "ab")
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True) if weighted else None
    torch.library.opcheck(OP, (prediction, target, weight))
    leaves = [x for x in (prediction, target, weight) if x is not None]
    assert torch.autograd.gradcheck(lambda p, t, w=None: OP(p, t, w), leaves)
    compiled = torch.compile(ops.weighted_mse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), ops.weighted_mse(*leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.ones(3, 5)}, r"target: expected shape of prediction = \[3, 4\]"),
        ({"target": torch.ones(3, 4).double()}, "target: expected the dtype of prediction"),
        ({"weight": torch.ones(4)}, r"weight: expected shape \[B\] = \[3\], got \[4\]"),
        ({"weight": torch.ones(3).long()}, "weight: expected a floating point dtype"),
        ({"weight": torch.ones(3, device="meta")}, "weight: expected the device of prediction"),
        ({"prediction": torch.ones(0, 4)}, "prediction: expected a shape .* with elements"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    call = {"prediction": torch.ones(3, 4), "target": torch.ones(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        ops.weighted_mse(**call)
