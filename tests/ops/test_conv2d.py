"""ops.conv2d: the definition, oneDNN, packed weights, gradients, operator checks and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compilers import ONEDNN_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.ops import onednn

OP = torch.ops.diffusion_fast.conv2d.default
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LAST = torch.channels_last
# (window, stride, padding): those of the models and of rewrites of them, and odd ones
WINDOWS = (
    ((3, 3), 1, 1),
    ((1, 1), 1, 0),
    ((3, 3), 2, 1),
    ((3, 3), 2, (0, 1, 0, 1)),
    ((2, 2), 1, (1, 0, 0, 1)),
    ((2, 5), 3, (2, 1, 0, 3)),
    ((1, 1), 2, 1),
)
EVERYTHING = ("bias", "x2", "add", "residual")


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | tuple[int, ...] = 0,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    pads = (padding,) * 4 if isinstance(padding, int) else padding
    both = F.pad(x if x2 is None else torch.cat((x, x2), 1), pads)
    y = F.conv2d(both, weight, bias, stride)
    y = y if add is None else y + add[:, :, None, None]
    return y if residual is None else y + residual


def arguments(
    names: tuple[str, ...],
    dtype: torch.dtype,
    window: tuple[Any, ...] = WINDOWS[0],
    size: tuple[int, int, int] = (2, 5, 6),
    channels: tuple[int, int, int] = (4, 3, 6),
    layout: str = "contiguous",
    weight_last: bool = False,
) -> dict[str, Any]:
    """``channels``: of x, of x2, and of the result."""
    batch, height, width = size
    (rows, columns), stride, padding = window
    first, second, out = channels

    def image(count: int, height: int, width: int) -> Tensor:
        if layout == "sliced":
            return torch.randn(batch, count, height, 2 * width + 1).to(dtype)[..., 1::2]
        value = torch.randn(batch, count, height, width).to(dtype)
        return value.contiguous(memory_format=LAST) if layout == "channels_last" else value

    inside = first + (second if "x2" in names else 0)
    weight = torch.randn(out, inside, rows, columns).to(dtype)
    found: dict[str, Any] = {
        "x": image(first, height, width),
        "weight": weight.contiguous(memory_format=LAST) if weight_last else weight,
        "stride": stride,
        "padding": padding,
    }
    shape = plain(torch.empty(batch, inside, height, width), weight.float(), None, stride, padding)
    more = {
        "bias": torch.randn(out).to(dtype),
        "x2": image(second, height, width),
        "add": torch.randn(batch, out).to(dtype),
        "residual": image(out, *shape.shape[2:]),
    }
    return found | {name: more[name] for name in names}


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in given.items()}


def outputs(call: Callable[..., Tensor], given: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients of all tensors."""
    given = {
        name: v.detach().requires_grad_() if isinstance(v, Tensor) else v
        for name, v in cast(given, dtype).items()
    }
    y = call(**given)
    cotangent = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    leaves = [v for v in given.values() if isinstance(v, Tensor)]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def operator(x: Tensor, weight: Tensor, stride: int, padding: Any, **more: Any) -> Tensor:
    """The registered operator, with its own gradient."""
    pads = [padding] * 4 if isinstance(padding, int) else list(padding)
    rest = (more.get(name) for name in ("x2", "add", "residual"))
    return OP(x, weight, more.get("bias"), stride, pads, *rest, ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("names", [(), EVERYTHING], ids=["alone", "everything"])
def test_values_and_gradients(
    dtype: torch.dtype, window: tuple[Any, ...], layout: str, names: tuple[str, ...]
) -> None:
    given = arguments(names, dtype, window, layout=layout)
    truths, ordinary = outputs(plain, given, torch.float64), outputs(plain, given, dtype)
    for call in (ops.conv2d, operator):
        for result, truth, other in zip(outputs(call, given, dtype), truths, ordinary, strict=True):
            assert_close(result, truth, other)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_part_alone(name: str) -> None:
    given = arguments((name,), torch.float64)
    for result, truth in zip(
        outputs(operator, given, torch.float64), outputs(plain, given, torch.float64), strict=True
    ):
        assert_close(result, truth)


@pytest.mark.parametrize("backend", ["reference", "onednn", "operator"])
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[1]], ids=str)
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [(4, 0, 6), (1, 0, 6)], ids=str)
@pytest.mark.usefixtures("_any_size")
def test_the_layout_of_the_result(
    backend: str,
    window: tuple[Any, ...],
    weight_last: bool,
    layout: str,
    channels: tuple[int, int, int],
) -> None:
    """That of F.conv2d: with one channel, or a window of one pixel, the strides decide."""
    given = arguments(("residual",), torch.float32, window, (2, 5, 6), channels, layout)
    if weight_last:
        given["weight"] = given["weight"].to(memory_format=LAST)
    expected = F.conv2d(given["x"], given["weight"], None, 1, given["padding"]).stride()
    if backend == "operator":
        assert operator(**given).stride() == expected
        return
    with ops.use_backend(backend):
        assert ops.conv2d(**given).stride() == expected


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "SMALL", 0)


def check_onednn(given: dict[str, Any], pack: bool = False) -> None:
    packed = None
    if pack:
        size = (*given["x"].shape[:1], given["weight"].shape[1], *given["x"].shape[2:])
        sizes = {name: given[name] for name in ("stride", "padding")}
        packed = ops.pack_conv2d(given["weight"], size, **sizes)
        assert (packed is None) == (given["weight"].shape[2:] == (1, 1))
    with ops.use_backend("onednn"):
        result = ops.conv2d(**given, packed=packed)
    assert_close(result, plain(**cast(given, torch.float64)), plain(**given))


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_onednn(
    dtype: torch.dtype, window: tuple[Any, ...], layout: str, weight_last: bool, pack: bool
) -> None:
    """Many pixels and few: convolutions, and products of the windows."""
    for channels in ((4, 3, 6), (5, 3, 320)):
        given = arguments(EVERYTHING, dtype, window, (2, 9, 7), channels, layout, weight_last)
        check_onednn(given, pack)


@pytest.mark.usefixtures("_any_size")
@settings(deadline=None, max_examples=80)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 70)),
    window=st.tuples(
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.integers(1, 3),
        st.tuples(*[st.integers(1, 2)] * 4),
    ),
    names=st.sets(st.sampled_from(("bias", "x2", "add"))),
    layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
    pack=st.booleans(),
    weight_last=st.booleans(),
)
def test_onednn_at_any_shape(
    size: tuple[int, int, int],
    channels: tuple[int, int, int],
    window: tuple[Any, ...],
    names: set[str],
    layout: str,
    pack: bool,
    weight_last: bool,
) -> None:
    parts = (*sorted(names), "residual")
    given = arguments(parts, torch.float32, window, size, channels, layout, weight_last)
    check_onednn(given, pack)


def call(given: dict[str, Any]) -> list[Any]:
    """The registered operator's arguments."""
    pads = [given["padding"]] * 4
    rest = [given.get(name) for name in ("x2", "add", "residual")]
    return [given["x"], given["weight"], given.get("bias"), given["stride"], pads, *rest, []]


def test_which_backend_runs_and_why() -> None:
    given = arguments((), torch.float32, size=(2, 16, 16), channels=(32, 0, 64))
    assert "F.conv2d is oneDNN" in ops.explain("conv2d", **given).rejected["onednn"]
    packed = ops.pack_conv2d(given["weight"], (2, 32, 16, 16), padding=1)
    ops.conv2d(**given, packed=packed)
    assert ops.explain("conv2d").last_ran == "onednn"
    given["weight"].requires_grad_()
    why = ops.explain("conv2d", **given, packed=packed)
    assert (why.backend, why.rejected["onednn"]) == ("reference", "a gradient is needed")
    ops.conv2d(**given, packed=packed).sum().backward()
    assert ops.explain("conv2d").last_ran == "reference"
    tiny = arguments(("residual",), torch.float32)
    assert "multiply-adds" in ops.explain("conv2d", **tiny).rejected["onednn"]
    pixels = arguments((), torch.float32, WINDOWS[1], (2, 32, 32), (64, 0, 64), "channels_last")
    assert ops.explain("conv2d", **pixels).backend == "onednn"
    few = arguments((), torch.float32, size=(1, 4, 4), channels=(256, 0, 256))
    assert ops.explain("conv2d", **few).backend == "onednn"


def test_a_dense_packed_weight_is_the_weight() -> None:
    """As cuDNN gets it on a GPU: laid out once, and not at each call."""
    given = arguments((), torch.float32, size=(2, 5, 5), channels=(4, 0, 6))
    packed = (given["weight"].contiguous(memory_format=torch.channels_last),)
    twice = (2 * packed[0],)
    with ops.use_backend("reference"):
        result, doubled = (ops.conv2d(**given, packed=p) for p in (packed, twice))
        assert_close(result, plain(**cast(given, torch.float64)), plain(**given))
        without_bias = given | {"bias": None}
        assert torch.equal(doubled - result, ops.conv2d(**without_bias, packed=packed))
        given["weight"].requires_grad_()
        ops.conv2d(**given, packed=twice).sum().backward()  # a gradient is that of the weight
    assert given["weight"].grad is not None


def test_follows_autocast_as_the_plain_function_does() -> None:
    given = arguments(EVERYTHING, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, other = ops.conv2d(**given), plain(**cast(given, torch.bfloat16))
    assert result.dtype == torch.bfloat16
    assert_close(result, plain(**cast(given, torch.float64)), other)


@pytest.mark.parametrize("names", [(), EVERYTHING], ids=["alone", "everything"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operator(names: tuple[str, ...], layout: str) -> None:
    size, channels = (2, 3, 3), (2, 2, 3)
    given = arguments(names, torch.float64, WINDOWS[3], size, channels, layout)
    order = call(given | {"padding": 0})
    order[4] = [0, 1, 0, 1]
    order = [v.requires_grad_() if isinstance(v, Tensor) else v for v in order]
    torch.library.opcheck(OP, tuple(order))
    assert torch.autograd.gradcheck(OP, order)


def test_compiles_and_exports_whole() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, x2: Tensor) -> Tensor:
            return ops.conv2d(x, weight, x2=x2, padding=1)

    values = torch.randn(2, 3, 5, 6), torch.randn(4, 5, 3, 3), torch.randn(2, 2, 5, 6)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*values), Block()(*values).double())
    assert "diffusion_fast.conv2d" in str(torch.export.export(Block(), values).graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 5, 5).int()}, "x: expected a floating point dtype"),
        ({"x": torch.ones(3, 5, 5)}, r"x: expected shape \[B, C, H, W\], got \[3, 5, 5\]"),
        ({"x": torch.ones(2, 3, 1, 5)}, r"x: expected at least the window \[3, 3\]"),
        ({"weight": torch.ones(4, 2, 3, 3)}, "weight: .* with C = 3, got"),
        ({"weight": torch.ones(4, 3, 3, 3).half()}, "weight: expected the dtype of x"),
        ({"bias": torch.ones(3)}, r"bias: expected shape \[O\] = \[4\], got \[3\]"),
        ({"stride": 0}, "stride: expected a positive integer, got 0"),
        ({"padding": -1}, "padding: expected an integer of at least 0, or four of them, got -1"),
        ({"padding": (1, 1)}, r"padding: expected .*, got \(1, 1\)"),
        ({"x2": torch.ones(2, 1, 5, 5)}, "weight: .* with C = 4, got"),
        ({"x2": torch.ones(2, 1, 4, 5)}, r"x2: expected shape \[B, C2, H, W\] = \[2, 1, 5, 5\]"),
        ({"add": torch.ones(2, 3)}, r"add: expected shape \[B, O\] = \[2, 4\], got \[2, 3\]"),
        ({"residual": torch.ones(2, 4, 5, 5)}, r"residual: .* = \[2, 4, 3, 3\], got"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(2, 3, 5, 5), "weight": torch.ones(4, 3, 3, 3)}
    with pytest.raises(ValueError, match=message):
        ops.conv2d(**(given | change))


@pytest.mark.parametrize(
    ("weight", "size", "message"),
    [
        (torch.ones(4, 4), (2, 4, 5, 5), "weight: expected shape"),
        (torch.ones(4, 3, 3, 3), (2, 4, 5, 5), r"size: expected \[B, C, H, W\] with C = 3"),
    ],
)
def test_bad_packing(weight: Tensor, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack_conv2d(weight, size)
