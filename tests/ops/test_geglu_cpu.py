"""The C++ geglu: values and gradients by the rule, in every dtype, whatever the threads."""

from __future__ import annotations

import pytest
import torch
from compilers import needs_cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

pytestmark = needs_cpu_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL = {"geglu": "cpu", "geglu_backward": "cpu"}


def plain(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def exact(x: Tensor) -> Tensor:
    """In float64; PyTorch's own gelu loses the tail there, where 1 + erf cancels."""
    value, gate = x.chunk(2, -1)
    return value * gate * 0.5 * torch.erfc(-gate * 0.5**0.5)


def run(function: object, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Value and gradient; the cotangent's numbers are ones that ``x.dtype`` has."""
    leaf = x.detach().to(dtype).requires_grad_()
    out = function(leaf)  # type: ignore[operator]
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(x.dtype).to(dtype)
    return [out, *torch.autograd.grad(out, leaf, grad)]


def check(x: Tensor) -> None:
    truths, ordinary = run(exact, x, torch.float64), run(plain, x, x.dtype)
    with ops.use_backend(**KERNEL):
        results = run(ops.geglu, x, x.dtype)
        assert ops.explain("geglu_backward").last_ran == "cpu"
    for result, truth, usual in zip(results, truths, ordinary, strict=True):
        assert_close(result, truth, usual)


@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([0.01, 1.0, 30.0]),
    threads=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients(
    rows: list[int], columns: int, dtype: torch.dtype, magnitude: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    check((torch.randn(*rows, 2 * columns) * magnitude).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_work_for_several_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    x = torch.randn(257, 520).to(dtype)
    check(x)
    with ops.use_backend(**KERNEL):
        shared = run(ops.geglu, x, dtype)
        torch.set_num_threads(1)
        alone = run(ops.geglu, x, dtype)
    assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True))


def test_strided_tensors_are_read_as_they_say() -> None:
    x = torch.randn(40, 6).T  # [6, 40]
    check(x)
    with ops.use_backend(**KERNEL):
        leaf = x.contiguous().requires_grad_()
        (found,) = torch.autograd.grad(ops.geglu(leaf).sum(), leaf)  # an expanded gradient
    truth = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(truth).sum(), truth)
    assert_close(found, expected)


def test_numbers_that_are_not_finite_stay_so() -> None:
    ends = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    x = torch.cat((torch.ones(4), ends))
    with ops.use_backend(**KERNEL):
        result = ops.geglu(x)
    torch.testing.assert_close(result, exact(x.double()).float(), equal_nan=True)


def test_a_gradient_of_the_gradient_is_the_references() -> None:
    x = torch.randn(300, 128, requires_grad=True)
    assert ops.explain("geglu", x).backend == "cpu"

    def twice(function: object, dtype: torch.dtype) -> Tensor:
        leaf = x.detach().to(dtype).requires_grad_()
        out = function(leaf)  # type: ignore[operator]
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    truth = twice(exact, torch.float64)
    assert_close(twice(ops.geglu, x.dtype), truth, twice(plain, x.dtype))


def test_auto_leaves_small_calls_to_pytorch() -> None:
    few, many = torch.randn(4, 64), torch.randn(256, 64)
    assert ops.explain("geglu", few).backend == "reference"
    assert ops.explain("geglu", few).rejected["cpu"] == "fewer than 16,384 elements"
    assert ops.explain("geglu", many).backend == "cpu"
