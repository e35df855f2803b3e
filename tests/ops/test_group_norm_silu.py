"""ops.group_norm_silu: values, gradients, layouts, extremes, operator checks and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.diffusion_fast.group_norm_silu.default
EXTRAS = list(itertools.product([False, True], repeat=4))  # silu, add, scale, shift


def inputs(
    dtype: torch.dtype, add: bool, scale: bool, shift: bool, size: tuple[int, ...] = (2, 8, 5, 3)
) -> dict[str, Tensor]:
    batch, channels = size[:2]
    values = {
        "x": torch.randn(size, dtype=dtype),
        "weight": torch.randn(channels, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
    }
    for name, wanted in (("add", add), ("scale", scale), ("shift", shift)):
        if wanted:
            values[name] = torch.randn(batch, channels, dtype=dtype)
    return values


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    groups: int = 4,
) -> Tensor:
    """The definition, written once more and differently."""
    trailing = (...,) + (None,) * (x.dim() - 2)
    if add is not None:
        x = x + add[trailing]
    x = F.group_norm(x, groups, weight, bias)
    if scale is not None:
        x = x * (1 + scale[trailing])
    if shift is not None:
        x = x + shift[trailing]
    return x * torch.sigmoid(x) if silu else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("silu", "add", "scale", "shift"), EXTRAS)
def test_values(dtype: torch.dtype, silu: bool, add: bool, scale: bool, shift: bool) -> None:
    values = inputs(dtype, add, scale, shift)
    result = ops.group_norm_silu(**values, num_groups=4, silu=silu)
    truth = plain(**{k: v.double() for k, v in values.items()}, silu=silu)
    assert_close(result, truth, plain(**values, silu=silu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("silu", "add", "scale", "shift"), EXTRAS)
def test_registered_gradient(
    dtype: torch.dtype, silu: bool, add: bool, scale: bool, shift: bool
) -> None:
    """The written-out backward against autograd of plain PyTorch."""
    values = inputs(dtype, add, scale, shift)

    def gradients(kind: str) -> list[Tensor]:
        cast = torch.float64 if kind == "truth" else dtype
        leaves = {k: v.detach().to(cast).requires_grad_() for k, v in values.items()}
        if kind == "op":
            call = dict.fromkeys(("add", "scale", "shift")) | leaves
            out = OP(
                call.pop("x"), 4, call.pop("weight"), call.pop("bias"), 1e-5, silu, *call.values()
            )
        else:
            out = plain(**leaves, silu=silu)
        cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(cast)
        return list(torch.autograd.grad(out, list(leaves.values()), cotangent))

    for result, truth, ordinary in zip(*map(gradients, ("op", "truth", "plain")), strict=True):
        assert_close(result, truth, ordinary)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 4),
    space=st.lists(st.integers(1, 5), max_size=3),
    channels_last=st.booleans(),
    sliced=st.booleans(),
)
def test_any_shape_and_layout(
    batch: int, groups: int, width: int, space: list[int], channels_last: bool, sliced: bool
) -> None:
    size = (batch, groups * width, *space)
    x = torch.randn(size, dtype=torch.float64)
    if channels_last and len(size) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if sliced:
        x = torch.randn(*size[:-1], 2 * size[-1] + 1, dtype=torch.float64)[..., 1::2]
    weight, bias = torch.randn(2, x.shape[1], dtype=torch.float64)
    result = ops.group_norm_silu(x, groups, weight, bias)
    if x[0].numel() == groups:  # one value, its own mean: F.group_norm refuses it, no kernel does
        assert_close(result, F.silu(bias[(...,) + (None,) * (x.dim() - 2)].expand(x.shape)))
    else:
        assert_close(result, plain(x, weight, bias, True, groups=groups))
    dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if dense else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)
    fake = torch.ops.diffusion_fast.group_norm_silu(
        x.to("meta"), groups, weight.to("meta"), bias.to("meta"), 1e-5, True, None, None, None
    )
    strides = zip(fake.stride(), result.stride(), result.shape, strict=True)
    assert all(a == b for a, b, n in strides if n > 1)


@pytest.mark.parametrize("mean", [1e4, -3e3])
def test_a_large_mean_leaves_the_variance_right(mean: float) -> None:
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64) * 1e-1 + mean
    weight, bias = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    values = [v.float() for v in (x, weight, bias)]
    truth = plain(values[0].double(), weight, bias, silu=False)
    result = ops.group_norm_silu(values[0], 4, *values[1:], silu=False)
    assert_close(result, truth, plain(*values, silu=False))


@settings(deadline=None, max_examples=30)
@given(
    size=st.sampled_from(
        [(2, 8, 9, 5), (1, 4, 70, 70), (3, 6, 1, 1), (2, 1, 4, 4), (1, 4, 3, 2, 5)]
    ),
    ratio=st.sampled_from([0.0, 1.0, 10.0, 100.0, 3e3]),
    dtype=st.sampled_from(DTYPES),
    sliced=st.booleans(),
    gradient=st.booleans(),
)
def test_channels_last_is_as_exact_as_contiguous(
    size: tuple[int, ...], ratio: float, dtype: torch.dtype, sliced: bool, gradient: bool
) -> None:
    form = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    weight, bias = torch.randn(2, size[1]).to(dtype)
    x = (torch.randn(size) + ratio).to(dtype)
    last = x.contiguous(memory_format=form)
    if sliced:  # every second channel of a wider tensor
        last = x.repeat_interleave(2, 1).contiguous(memory_format=form)[:, ::2]
    last.requires_grad_(gradient)
    groups = size[1] // 2 or 1
    # Of one value a group there is no norm; of two, and far from zero in float64, the truth that
    # float64 can give is no better than what is tested.
    ill = (x[0].numel() <= 2 * groups, dtype == torch.float64, ratio > 100)
    if x[0].numel() == groups or sum(ill) > 1:
        return
    result = ops.group_norm_silu(last, groups, weight, bias, silu=False)
    truth = F.group_norm(x.double(), groups, weight.double(), bias.double())
    assert_close(result.detach(), truth, F.group_norm(x, groups, weight, bias))
    if gradient:
        cotangent = torch.linspace(-1, 1, x.numel()).view(size)

        def plain_gradient(cast: torch.dtype) -> Tensor:
            leaf = x.to(cast, copy=True).requires_grad_()
            out = F.group_norm(leaf, groups, weight.to(cast), bias.to(cast))
            return torch.autograd.grad(out, leaf, cotangent.to(cast))[0]

        got = torch.autograd.grad(result, last, cotangent.to(dtype))[0]
        assert_close(got, plain_gradient(torch.float64), plain_gradient(dtype))


TABLES = ("add", "scale", "shift")


def tables(dtype: torch.dtype, images: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Tables [5, images, 8], each a part of a wider one."""
    whole = torch.randn(5, images, 30, dtype=dtype)
    return {name: whole[..., 9 * i : 9 * i + 8] for i, name in enumerate(names)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("names", [("add",), ("scale", "shift"), TABLES])
def test_a_row_of_tables(dtype: torch.dtype, images: int, names: tuple[str, ...]) -> None:
    values, given = inputs(dtype, False, False, False), tables(dtype, images, names)
    for rows in ([0], [3], [4, 1], [2, 2]):
        at = torch.tensor(rows)
        result = ops.group_norm_silu(**values, num_groups=4, **given, row=at)
        images_of = [0, images - 1]
        both = rows * (2 // len(rows))
        picked = {name: table[both, images_of] for name, table in given.items()}
        assert torch.equal(result, ops.group_norm_silu(**values, num_groups=4, **picked))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("rows", [[3], [1, 1], [4, 0]])
@pytest.mark.parametrize("names", [("add",), ("scale", "shift"), TABLES])
def test_operator_with_tables(images: int, names: tuple[str, ...], rows: list[int]) -> None:
    """Gradients of images that read the same row add."""
    values = inputs(torch.float64, False, False, False)
    leaves = [v.contiguous() for v in tables(torch.float64, images, names).values()]
    leaves = [v.requires_grad_() for v in (*values.values(), *leaves)]
    row = torch.tensor(rows)

    def run(*leaves: Tensor) -> Tensor:
        x, weight, bias, *rest = leaves
        given = dict(zip(names, rest, strict=True))
        return OP(x, 4, weight, bias, 1e-5, True, *map(given.get, TABLES), None, row)

    assert torch.autograd.gradcheck(run, leaves)
    x, weight, bias, *rest = leaves
    given = dict(zip(names, rest, strict=True))
    args = (x, 4, weight, bias, 1e-5, True, *map(given.get, TABLES), None, row)
    torch.library.opcheck(OP, args)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("extras", [(False, False, False), (True, True, True), (True, False, True)])
def test_operator(channels_last: bool, extras: tuple[bool, bool, bool]) -> None:
    values = inputs(torch.float64, *extras)
    if channels_last:
        values["x"] = values["x"].contiguous(memory_format=torch.channels_last)
    call = dict.fromkeys(("add", "scale", "shift")) | {
        k: v.requires_grad_() for k, v in values.items()
    }
    args = (call.pop("x"), 4, call.pop("weight"), call.pop("bias"), 1e-5, True, *call.values())
    torch.library.opcheck(OP, args)
    leaves = list(values.values())

    def run(*leaves: Tensor) -> Tensor:
        now = dict(zip(values, leaves, strict=True))
        x, weight, bias = (now.pop(k) for k in ("x", "weight", "bias"))
        rest = (now.get(k) for k in ("add", "scale", "shift"))
        return OP(x, 4, weight, bias, 1e-5, True, *rest)

    assert torch.autograd.gradcheck(run, leaves)


def test_compiles_and_exports_whole() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.GroupNorm(4, 8)

        def forward(self, x: Tensor, add: Tensor) -> Tensor:
            return ops.group_norm_silu(x, 4, self.norm.weight, self.norm.bias, add=add)

    block, x, add = Block(), torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, add), block(x, add))
    gradient = torch.autograd.grad(compiled(x, add).sum(), block.norm.weight)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(block(x, add).sum(), block.norm.weight)
    )
    table, row = torch.randn(3, 1, 8), torch.tensor([2])
    args = x, 4, block.norm.weight, block.norm.bias, 1e-5, True
    picking = torch.compile(ops.group_norm_silu, fullgraph=True, backend="aot_eager")
    expected = ops.group_norm_silu(*args, add=table[2].expand(2, -1))
    torch.testing.assert_close(picking(*args, add=table, row=row), expected)
    exported = torch.export.export(block, (x, add))
    assert "diffusion_fast.group_norm_silu" in str(exported.graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, r"num_groups: expected a divisor of the 8 channels of x, got 3"),
        ({"eps": -1.0}, r"eps: expected a number of at least 0, got -1.0"),
        ({"eps": float("nan")}, r"eps: expected a finite number, got nan"),
        ({"num_groups": 0}, r"num_groups: expected a positive integer, got 0"),
        ({"weight": torch.ones(7)}, r"weight: expected shape \[C\] = \[8\], got \[7\]"),
        ({"bias": torch.ones(8).double()}, r"bias: expected the dtype of x"),
        ({"add": torch.ones(1, 8)}, r"add: expected shape \[B, C\] = \[2, 8\], got \[1, 8\]"),
        ({"scale": torch.ones(2, 8).half()}, r"scale: expected the dtype of x"),
        ({"shift": torch.ones(2, 8, device="meta")}, r"shift: expected the device of x"),
        ({"x": torch.ones(8)}, r"x: expected shape \[B, C, ...\]"),
        ({"x": torch.ones(2, 8, 3).int()}, r"x: expected a floating point dtype"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    call = {**inputs(torch.float32, False, False, False), "num_groups": 4} | change
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.tensor([1.0])}, r"row: expected dtype torch.int64, got torch.float32"),
        ({"row": torch.tensor(1)}, r"row: expected shape \[1\] or \[B\] = \[2\], got \[\]"),
        ({"row": torch.zeros(3).long()}, r"row: expected shape \[1\] or \[B\] = \[2\], got \[3\]"),
        ({"row": torch.zeros(1, device="meta").long()}, r"row: expected the device of x \(cpu\)"),
        (
            {"add": torch.ones(2, 8)},
            r"add: expected shape \[R, B or 1, C\] with B, C = \[2, 8\], got \[2, 8\]",
        ),
        ({"scale": torch.ones(5, 3, 8)}, r"scale: expected shape \[R, B or 1, C\]"),
        ({"shift": torch.ones(5, 1, 7)}, r"shift: expected shape \[R, B or 1, C\]"),
        ({"shift": torch.ones(5, 1, 8).half()}, r"shift: expected the dtype of x"),
        ({"add": torch.ones(5, 2, 8, device="meta")}, r"add: expected the device of x"),
    ],
)
def test_bad_tables(change: dict[str, object], message: str) -> None:
    call = {**inputs(torch.float32, False, False, False), "num_groups": 4}
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**call, **{"row": torch.tensor([1]), **change})


@pytest.mark.parametrize("given", ["weight", "add", "row"])
def test_what_is_no_tensor(given: str) -> None:
    call = {**inputs(torch.float32, False, False, False), "num_groups": 4, given: [1.0]}
    with pytest.raises(TypeError, match=f"{given}: expected a tensor, got list"):
        ops.group_norm_silu(**call)


def test_nothing_that_a_caller_holds_is_written() -> None:
    values = inputs(torch.float32, True, True, True)
    kept = {name: value.clone() for name, value in values.items()}
    ops.group_norm_silu(**values, num_groups=4)
    ops.group_norm_silu(values["x"], 4, values["weight"], values["bias"])
    assert all(torch.equal(values[name], kept[name]) for name in values)
