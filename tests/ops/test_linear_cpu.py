"""Linear layers on the CPU kernel: values by the rule, at any size, with all that follows them."""

from __future__ import annotations

import math
from typing import Any

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


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    geglu: bool = False,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if geglu:
        value, gate = y.chunk(2, -1)
        y = value * F.gelu(gate)
    return y if residual is None else y + residual


def packed(weight: Tensor, geglu: bool = False) -> Any:
    with ops.use_backend(linear="cpu"):
        return ops.pack_linear(weight, 8, geglu=geglu)


def check(x: Tensor, weight: Tensor, geglu: bool = False, **more: Tensor | None) -> Tensor:
    with ops.use_backend(linear="cpu"):
        result = ops.linear(x, weight, geglu=geglu, packed=packed(weight, geglu), **more)
    double = {name: None if one is None else one.double() for name, one in more.items()}
    truth = plain(x.double(), weight.double(), geglu=geglu, **double)
    assert_close(result, truth, plain(x, weight, geglu=geglu, **more))
    assert result.is_contiguous()
    return result


@settings(deadline=None, max_examples=120)
@given(
    rows=st.one_of(st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 3), st.integers(1, 9))),
    inner=st.integers(1, 700),
    out=st.integers(1, 150),
    geglu=st.booleans(),
    names=st.sets(st.sampled_from(("bias", "residual"))),
    sliced=st.booleans(),
)
def test_any_call(
    rows: tuple[int, ...], inner: int, out: int, geglu: bool, names: set[str], sliced: bool
) -> None:
    # Of a few sums none may cancel, with which the rule would compare errors.
    draw = torch.randn if math.prod(rows) * out >= 16 else torch.rand

    def make(*size: int) -> Tensor:
        return draw(*size[:-1], 2 * size[-1] + 1)[..., 1::2] if sliced else draw(*size)

    wide = out * (1 + geglu)
    more = {"bias": make(wide), "residual": make(*rows, out)}
    weight = make(wide, inner) / inner**0.5
    check(make(*rows, inner), weight, geglu, **{name: more[name] for name in sorted(names)})


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("inner", [320, 1280, 2048, 5120])
@pytest.mark.parametrize("geglu", [False, True])
def test_widths_of_models(inner: int, scale: float, geglu: bool) -> None:
    weight, bias = torch.randn(640, inner) / inner**0.5, scale * torch.randn(640)
    check(scale * torch.randn(2, 50, inner), weight, geglu, bias=bias)


def test_gates_from_where_they_close_to_where_they_are_open() -> None:
    """Values of 1, so that the result is gelu of the gate; it goes to 0 as it should."""
    gates = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([-1e30, 0.0, 1e30])])
    x = torch.stack([torch.ones_like(gates), gates], 1)
    result = check(x, torch.eye(2), True)[:, 0]
    assert result[-3] == 0
    assert result[-1] == gates[-1]
    tail = torch.linspace(-5.5, -3, 500)
    found = check(torch.stack([torch.ones_like(tail), tail], 1), torch.eye(2), True)[:, 0]
    torch.testing.assert_close(found.double(), F.gelu(tail.double()), rtol=2e-5, atol=0)


def test_numbers_that_are_not_finite_stay_in_their_rows() -> None:
    x, weight = torch.randn(20, 40), torch.randn(24, 40)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    with ops.use_backend(linear="cpu"):
        result = ops.linear(x, weight, packed=packed(weight))
    finite = result.isfinite().all(1)
    assert result[3].isnan().all()
    assert finite.sum() == 18
    assert not finite[7]


def test_threads_do_not_change_a_bit() -> None:
    x, weight = torch.randn(500, 700), torch.randn(600, 700)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with ops.use_backend(linear="cpu"):
                found.append(ops.linear(x, weight, geglu=True, packed=packed(weight, True)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("geglu", [False, True])
def test_every_backend_takes_a_weight_that_is_packed_for_it(geglu: bool) -> None:
    """The others read the weight itself."""
    x, weight = torch.randn(256, 128), torch.randn(128, 128)
    more: dict[str, Any] = {"geglu": geglu, "packed": packed(weight, geglu)}
    truth = plain(x.double(), weight.double(), geglu=geglu)
    assert ops.explain("linear", x, weight, **more).backend == "cpu"
    for backend in ("reference", "onednn"):
        with ops.use_backend(linear=backend):
            assert_close(ops.linear(x, weight, **more), truth, plain(x, weight, geglu=geglu))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": None}, "not packed for it"),
        ({"bias": torch.ones(4, requires_grad=True)}, "a gradient is needed"),
        ({"norm": (torch.ones(6), torch.ones(6), torch.ones(4))}, "a LayerNorm is folded into it"),
    ],
)
def test_calls_that_are_not_its_work(change: dict[str, Any], message: str) -> None:
    x, weight = torch.ones(6, 5), torch.ones(4, 5)
    call = {"x": x, "weight": weight, "packed": packed(weight)} | change
    with ops.use_backend(linear="cpu"), pytest.raises(ops.BackendError, match=message):
        ops.linear(**call)


def test_the_copy_is_as_large_as_the_weight() -> None:
    weight = torch.randn(96, 40)
    assert packed(weight)[0].nbytes == weight.nbytes
    assert packed(weight, geglu=True)[0].nbytes == weight.nbytes
