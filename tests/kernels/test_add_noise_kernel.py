"""The noising kernel: values, gradients, layouts, noise drawn in the kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, check, randn, same_bits
from torch import Tensor

from diffusion_fast import ops

TARGETS = ("epsilon", "v_prediction", "sample")
LAYOUTS = ("contiguous", "channels_last", "sliced")


def tables(dtype: torch.dtype, steps: int = 50) -> dict[str, Tensor]:
    signal = torch.linspace(0.999, 0.06, steps, dtype=torch.float64)
    signal, sigma = signal.to(DEVICE), (1 - signal**2).sqrt().to(DEVICE)
    dtype = torch.promote_types(dtype, torch.float32)
    names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    return dict(zip(names, (signal.to(dtype), sigma.to(dtype)), strict=True))


def timesteps(batch: int) -> Tensor:
    return torch.randint(0, 50, (batch,), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(dtype: torch.dtype, target: str, layout: str) -> None:
    values = {name: randn(3, 5, 7, 9, dtype=dtype, layout=layout) for name in ("x_0", "noise")}
    values |= {"t": timesteps(3), **tables(dtype)}
    gradients = ("x_0", "noise") if target != "sample" else ("noise",)
    check(lambda **v: ops.add_noise(**v, target=target), values, gradients)


@pytest.mark.parametrize(
    "size", [(1,), (5,), (0, 3), (2, 0), (1, 1, 1), (2, 2049), (70, 3), (2, 3, 4, 5, 6), (3, 6000)]
)
def test_sizes(size: tuple[int, ...]) -> None:
    values = {name: randn(*size, dtype=torch.float32) for name in ("x_0", "noise")}
    values |= {"t": timesteps(size[0]), **tables(torch.float32)}
    check(lambda **v: ops.add_noise(**v, target="v_prediction"), values)


@pytest.mark.parametrize("permutation", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (2, 0, 1)])
def test_the_batch_may_lie_anywhere_in_memory(permutation: tuple[int, ...]) -> None:
    """Dense but permuted: the kernel follows memory, without a copy."""
    values = {n: randn(3, 4, 5, dtype=torch.float64).permute(permutation) for n in ("x_0", "noise")}
    values |= {"t": timesteps(values["x_0"].shape[0]), **tables(torch.float64)}
    check(lambda **v: ops.add_noise(**v, target="v_prediction"), values, ("x_0", "noise"))


def test_arguments_of_different_layouts() -> None:
    values = {
        "x_0": randn(2, 4, 5, 6, dtype=torch.float32, layout="channels_last"),
        "noise": randn(2, 4, 5, 6, dtype=torch.float32),
        "t": timesteps(4)[::2],
        **{k: v.repeat_interleave(2)[::2] for k, v in tables(torch.float32).items()},
    }
    check(lambda **v: ops.add_noise(**v, target="v_prediction"), values, ("x_0", "noise"))


def test_an_expanded_argument() -> None:
    values = {"x_0": randn(1, 4, 5, dtype=torch.float32).expand(3, 4, 5)}
    values |= {"noise": randn(3, 4, 5, dtype=torch.float32), "t": timesteps(3)}
    values |= tables(torch.float32)
    with ops.use_backend("triton"):
        result = ops.add_noise(**values)[0]
    torch.testing.assert_close(result, ops.add_noise(**values)[0])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("target", TARGETS)
def test_drawn_noise(dtype: torch.dtype, target: str) -> None:
    philox = ops.Philox(2**40 + 3, 9)
    values = {"x_0": randn(3, 4, 6, 5, dtype=dtype), "t": timesteps(3), **tables(dtype)}
    check(lambda **v: ops.add_noise(noise=philox, **v, target=target), values, ("x_0",))


@pytest.mark.parametrize("size", [(3, 3, 5, 7), (2, 4, 6, 6)])
@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed"])
def test_drawn_noise_does_not_depend_on_the_layout(size: tuple[int, ...], layout: str) -> None:
    x_0 = torch.zeros(size, device=DEVICE)
    if layout == "transposed":
        x_0 = torch.zeros(size[1], size[0], *size[2:], device=DEVICE).transpose(0, 1)
    elif layout != "contiguous":
        x_0 = randn(*size, dtype=torch.float32, layout=layout).zero_()
    one = torch.ones(1, device=DEVICE)
    t = torch.zeros(size[0], dtype=torch.int64, device=DEVICE)
    truth = ops.Philox(5, 2).normal(size, device=DEVICE)
    for state in ("cpu", DEVICE):
        with ops.use_backend("triton"):
            x_t, noise = ops.add_noise(x_0, ops.Philox(5, 2, state), t, one, one)
        assert torch.equal(x_t, noise)
        assert x_t.stride() == torch.empty_like(x_0).stride()
        torch.testing.assert_close(noise, truth, rtol=6 * 2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_noise_returned_is_what_entered_x_t(dtype: torch.dtype, target: str) -> None:
    """Rounded to the dtype before it is used, as if a tensor had been given; float64 included."""
    x_0 = randn(2, 8, 9, dtype=dtype)
    call = {"t": timesteps(2), **tables(dtype)}
    with ops.use_backend("triton"):
        _, noise = ops.add_noise(x_0, ops.Philox(1), **call)
        drawn = ops.add_noise(x_0, ops.Philox(1), **call, target=target)
        given = ops.add_noise(x_0, noise, **call, target=target)
    for result, expected in zip(drawn, given, strict=True):
        assert same_bits(result, expected)


def test_an_infinite_gradient_is_not_nan() -> None:
    """Where there is no second gradient to turn with."""
    x_0 = randn(2, 3, dtype=torch.float32).requires_grad_()
    noise, cotangent = torch.zeros(2, 3, device=DEVICE), torch.full((2, 3), 3e38, device=DEVICE)
    cotangent[0, 0] = float("inf")
    call = {"t": timesteps(2), **tables(torch.float32)}
    results = []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            x_t, _ = ops.add_noise(x_0, noise, **call)
            results += torch.autograd.grad(x_t, x_0, cotangent)
    torch.testing.assert_close(*results)


def test_operator_and_export() -> None:
    x_0 = randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    t, (signal, sigma) = timesteps(2), tables(torch.float64).values()
    state = ops.Philox(4, 1).state
    noise = randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    with ops.use_backend("triton"):
        for target in TARGETS:
            op = torch.ops.diffusion_fast.add_noise_philox.default
            torch.library.opcheck(op, (x_0, state, t, signal, sigma, target))
        for velocity in (False, True):
            op = torch.ops.diffusion_fast.add_noise.default
            torch.library.opcheck(op, (x_0, noise, t, signal, sigma, velocity))

        class Noising(torch.nn.Module):
            def forward(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return ops.add_noise(x_0, ops.Philox(4), t, signal, sigma, "v_prediction")

        x_0 = x_0.detach()
        compiled = torch.compile(Noising(), fullgraph=True, backend="aot_eager")
        for result, expected in zip(compiled(x_0, t), Noising()(x_0, t), strict=True):
            assert same_bits(result, expected)
        assert "add_noise_philox" in str(torch.export.export(Noising(), (x_0, t)).graph)


def test_auto_on_the_cpu_stays_with_the_reference() -> None:
    x, one = torch.ones(2, 3), torch.ones(1)
    ops.add_noise(x, x, torch.zeros(2, dtype=torch.int64), one, one)
    choice = ops.explain("add_noise")
    assert choice.last_ran == "reference"
    args = (x, x, torch.zeros(2, dtype=torch.int64), one, one)
    assert ops.explain("add_noise", *args).rejected["triton"] == "the tensors are on the CPU"


def test_a_dtype_the_kernels_do_not_know_is_refused() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    tables = torch.ones(1, device=DEVICE), torch.ones(1, device=DEVICE).to(torch.float8_e4m3fn)
    call = x, x, torch.zeros(2, dtype=torch.int64, device=DEVICE), *tables
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="float8"):
        ops.add_noise(*call)
