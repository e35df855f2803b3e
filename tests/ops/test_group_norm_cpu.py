"""The C++ group norm: values and gradients by the rule, in every layout, whatever the threads."""

from __future__ import annotations

import pytest
import torch
from compilers import needs_cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels.layout import format_of

pytestmark = needs_cpu_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTRAS = ("add", "scale", "shift")


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    x2: Tensor | None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    x = x if x2 is None else torch.cat((x, x2), 1)
    trailing = (...,) + (None,) * (x.dim() - 2)
    if add is not None:
        x = x + add[trailing]
    x = torch.group_norm(x.contiguous(), groups, weight, bias, 1e-5)
    if scale is not None:
        x = x * (1 + scale[trailing])
    if shift is not None:
        x = x + shift[trailing]
    return torch.nn.functional.silu(x) if silu else x


def check(
    size: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    last: bool,
    second: int,
    silu: bool,
    extras: tuple[str, ...],
    mean: float = 0.0,
) -> None:
    """Values and all gradients of one call."""
    torch.manual_seed(0)
    batch, channels = size[0], size[1] + second
    values = {"x": torch.randn(size) + mean, "weight": torch.randn(channels)}
    values["bias"] = torch.randn(channels)
    if second:
        values["x2"] = torch.randn(batch, second, *size[2:]) - mean
    values |= {name: torch.randn(batch, channels) for name in extras}
    values = {name: value.to(dtype) for name, value in values.items()}
    form = {4: torch.channels_last}.get(len(size)) if last else None
    for name in {"x", "x2"} & values.keys() if form else ():
        values[name] = values[name].contiguous(memory_format=form)

    def cotangent(out: Tensor) -> Tensor:
        """The same numbers for all, the truth included: those that ``dtype`` has."""
        return torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype).to(out.dtype)

    def run(kind: str) -> list[Tensor]:
        leaves = {
            k: v.detach().to(torch.float64 if kind == "truth" else dtype).requires_grad_()
            for k, v in values.items()
        }
        call = {"groups": groups, "silu": silu, "x2": None} | leaves
        if kind == "cpu":
            with ops.use_backend(group_norm_silu="cpu", group_norm_silu_backward="cpu"):
                out = ops.group_norm_silu(num_groups=call.pop("groups"), **call)
                return [out, *torch.autograd.grad(out, list(leaves.values()), cotangent(out))]
        out = plain(**call)
        return [out, *torch.autograd.grad(out, list(leaves.values()), cotangent(out))]

    results = run("cpu")
    for result, truth, ordinary in zip(results, run("truth"), run("plain"), strict=True):
        assert_close(result, truth, ordinary)
    for result, name in zip(results, ["x", *values], strict=True):
        if name in ("x", "x2"):
            assert result.is_contiguous(memory_format=format_of(values[name]))


@pytest.mark.parametrize("rows", [[3], [4, 1, 1], [0, 2, 4]])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_tables(dtype: torch.dtype, last: bool, images: int, rows: list[int]) -> None:
    """One row for all images, or each image's own; values, and gradients of the tables."""
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, 8, 6, 5).to(dtype).contiguous(memory_format=form)
    weight, bias = torch.randn(2, 8).to(dtype)
    tables = {name: torch.randn(5, images, 8).to(dtype).requires_grad_() for name in EXTRAS}
    each = rows * (3 // len(rows))

    def run(dtype: torch.dtype, call: object) -> list[Tensor]:
        given = {k: v.detach().to(dtype).requires_grad_() for k, v in tables.items()}
        y = call(given)
        slope = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        return [y, *torch.autograd.grad(y, list(given.values()), slope)]

    def ours(given: dict[str, Tensor]) -> Tensor:
        with ops.use_backend(group_norm_silu="cpu", group_norm_silu_backward="cpu"):
            return ops.group_norm_silu(x, 4, weight, bias, **given, row=torch.tensor(rows))

    def ordinary(given: dict[str, Tensor]) -> Tensor:
        wide = next(iter(given.values())).dtype
        rows_of = {k: v[each, range(3) if images == 3 else [0] * 3] for k, v in given.items()}
        return plain(x.to(wide), weight.to(wide), bias.to(wide), 4, True, None, **rows_of)

    results = zip(run(dtype, ours), run(torch.float64, ordinary), run(dtype, ordinary), strict=True)
    for result, truth, ordinary_one in results:
        assert_close(result, truth, ordinary_one)


@settings(deadline=None, max_examples=60, derandomize=True)  # one sum in thousands cancels
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 9),
    space=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    second=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    last=st.booleans(),
    silu=st.booleans(),
    extras=st.sets(st.sampled_from(EXTRAS)),
)
def test_any_call(
    batch: int,
    groups: int,
    width: int,
    space: list[int],
    second: int,
    dtype: torch.dtype,
    last: bool,
    silu: bool,
    extras: set[str],
) -> None:
    # The second source has whole groups, or the border lies inside of one.
    second = second * groups if second < 2 else groups * width // 2
    first = groups * width if second % groups == 0 else groups * width - second
    size = (batch, first, *space)
    if first < 1 or (first + second) // groups * torch.tensor(space).prod() < 8:
        return  # of so few values a norm is ill-conditioned
    check(size, groups, dtype, last, second, silu, tuple(n for n in EXTRAS if n in extras))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 72, 33, 31), (1, 1280, 8, 9), (1, 6, 150, 150)])
def test_images_of_many_parts(size: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    check(size, 6 if size[1] == 6 else 8, dtype, last, 8 if size[1] == 72 else 0, True, ("add",))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mean", [1e2, 3e3])
def test_a_large_mean_costs_no_digits(mean: float, last: bool) -> None:
    check((2, 32, 24, 24), 4, torch.float32, last, 0, False, ("add",), mean)


@pytest.mark.parametrize("last", [False, True])
def test_threads_do_not_change_a_bit(last: bool) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 64, 40, 40).contiguous(memory_format=form).requires_grad_()
    weight, bias = torch.randn(2, 64)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ops.use_backend(group_norm_silu="cpu", group_norm_silu_backward="cpu"):
                y = ops.group_norm_silu(x, 8, weight, bias)
                found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_what_the_kernels_leave_to_pytorch() -> None:
    x, weight = torch.randn(2, 8, 4, 4), torch.ones(8)
    with ops.use_backend("cpu"):
        with pytest.raises(ops.BackendError, match="dtype"):
            ops.group_norm_silu(x.double(), 4, weight.double(), weight.double())
        with pytest.raises(ops.BackendError, match="a tensor is empty"):
            ops.group_norm_silu(x[:0], 4, weight, weight)
    assert ops.group_norm_silu(x[:0], 4, weight, weight).shape == (0, 8, 4, 4)


def test_small_contiguous_images_are_left_to_pytorch() -> None:
    weight = torch.ones(8)

    def ran(size: int, form: torch.memory_format, gradient: bool = False) -> str | None:
        x = torch.randn(1, 8, size, size).contiguous(memory_format=form)
        ops.group_norm_silu(x.requires_grad_(gradient), 4, weight, weight)
        return ops.explain("group_norm_silu").last_ran

    assert ran(4, torch.channels_last) == ran(4, torch.channels_last, True) == "cpu"
    assert ran(4, torch.contiguous_format) == "reference"
    assert ran(64, torch.contiguous_format) == "cpu"
    assert ran(64, torch.contiguous_format, True) == "reference"


def test_the_gradient_of_a_gradient_is_pytorchs_own() -> None:
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)

    def penalty(dtype: torch.dtype, norm: object) -> Tensor:
        leaf, weight = x.to(dtype, copy=True).requires_grad_(), torch.ones(4, dtype=dtype)
        out = norm(leaf, 2, weight, weight, silu=False).pow(3).sum()
        (slope,) = torch.autograd.grad(out, leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    def ordinary(x: Tensor, groups: int, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        return torch.group_norm(x.contiguous(), groups, weight, bias, 1e-5)

    truth, plainly = (penalty(dtype, ordinary) for dtype in (torch.float64, torch.float32))
    assert_close(penalty(torch.float32, ops.group_norm_silu), truth, plainly)


def test_a_nan_stays_one() -> None:
    for dtype in DTYPES:
        x = torch.randn(2, 8, 5, 5).to(dtype)
        x[1, 3, 2, 2] = torch.nan
        y = ops.group_norm_silu(x, 4, torch.ones(8).to(dtype), torch.zeros(8).to(dtype))
        assert y[1, 2:4].isnan().all()
        assert y.isnan().sum() == 2 * 25
