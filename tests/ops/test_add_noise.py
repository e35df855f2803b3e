"""ops.add_noise: the closed form, its targets, layouts, gradients and errors."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
T = 10


def tables(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    alphas = torch.linspace(0.999, 0.01, T, dtype=torch.float64)
    return alphas.sqrt().to(dtype), (1 - alphas).sqrt().to(dtype)


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (3, 2, 5, 7)) -> tuple[Tensor, ...]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.tensor([0, 4, 9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_values(dtype: torch.dtype, target: str) -> None:
    x_0, noise, t = inputs(dtype)
    signal, sigma = tables()
    x_t, y = ops.add_noise(x_0, noise, t, signal, sigma, target)
    a, s = (table.double()[t].view(-1, 1, 1, 1) for table in (signal, sigma))
    x, z = x_0.double(), noise.double()
    truth = {"epsilon": z, "v_prediction": a * z - s * x, "sample": x}[target]
    plain_a, plain_s = a.to(dtype), s.to(dtype)
    assert_close(x_t, a * x + s * z, plain_a * x_0 + plain_s * noise)
    assert_close(y, truth, plain_a * noise - plain_s * x_0)
    assert x_t.dtype == y.dtype == dtype


@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 2, 4, 4, 2)])
def test_any_rank_and_empty(shape: tuple[int, ...]) -> None:
    x_t, _ = ops.add_noise(*inputs(torch.float32, shape), *tables(), "v_prediction")
    assert x_t.shape == shape
    x_t, _ = ops.add_noise(
        torch.empty(0, 2), torch.empty(0, 2), torch.empty(0, dtype=torch.int64), *tables()
    )
    assert x_t.shape == (0, 2)


def test_channels_last_stays() -> None:
    x_0, noise, t = inputs(torch.float32)
    x_0, noise = (x.contiguous(memory_format=torch.channels_last) for x in (x_0, noise))
    x_t, _ = ops.add_noise(x_0, noise, t, *tables())
    assert x_t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("velocity", [False, True])
def test_operator(velocity: bool) -> None:
    x_0, noise, t = inputs(torch.float64)
    args = (x_0.requires_grad_(), noise.requires_grad_(), t, *tables(torch.float64), velocity)
    torch.library.opcheck(torch.ops.diffusion_fast.add_noise.default, args)
    assert torch.autograd.gradcheck(
        lambda x, z: torch.ops.diffusion_fast.add_noise(x, z, *args[2:])[: 1 + velocity],
        (x_0, noise),
    )


def test_compiles_whole() -> None:
    x_0, noise, t = inputs(torch.float32)
    step = torch.compile(ops.add_noise, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        step(x_0, noise, t, *tables(), "v_prediction"),
        ops.add_noise(x_0, noise, t, *tables(), "v_prediction"),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "velocity"}, r"target: expected one of epsilon, v_prediction, sample"),
        ({"noise": torch.randn(3, 2, 5, 6)}, r"noise: expected shape of x_0 = \[3, 2, 5, 7\], got"),
        ({"noise": torch.randn(3, 2, 5, 7).double()}, r"noise: expected the dtype of x_0"),
        ({"t": torch.tensor([0, 1, T])}, r"t: expected values in \[0, 10\), got .*10\]"),
        ({"t": torch.tensor([-1, 1, 2])}, r"t: expected values in \[0, 10\)"),
        ({"t": torch.tensor([0, 1])}, r"t: expected shape \[B\] = \[3\], got \[2\]"),
        ({"t": torch.tensor([0.0, 1, 2])}, r"t: expected dtype torch.int64"),
        ({"x_0": torch.zeros(3, 2, 5, 7).long()}, r"x_0: expected a floating point dtype"),
        ({"sigma": torch.ones(3)}, r"sqrt_one_minus_alphas_cumprod: expected shape"),
        ({"noise": torch.empty(3, 2, 5, 7, device="meta")}, r"noise: expected the device of x_0"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    x_0, noise, t = inputs(torch.float32)
    signal, sigma = tables()
    call = {"x_0": x_0, "noise": noise, "t": t, "signal": signal, "sigma": sigma} | change
    target = call.pop("target", "epsilon")
    with pytest.raises(ValueError, match=message):
        ops.add_noise(*call.values(), target)


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="x_0: expected a tensor, got list"):
        ops.add_noise([1.0], torch.ones(1), torch.zeros(1).long(), *tables())
