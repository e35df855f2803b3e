"""ops.linear: the definition, oneDNN, packed weights, gradients, operator checks and errors."""

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

OP = torch.ops.diffusion_fast.linear.default
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("plain", "bias", "residual", "geglu", "geglu_residual", "norm", "norm_geglu")


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    geglu: bool = False,
    norm: tuple[Tensor, ...] | None = None,
) -> Tensor:
    if norm is None:
        y = F.linear(x, weight, bias)
    else:
        mean, rstd, sums = norm
        y = x.to(mean.dtype) @ weight.to(mean.dtype).mT
        y = ((y - mean.unsqueeze(-1) * sums) * rstd.unsqueeze(-1)) + (0 if bias is None else bias)
        y = y.to(x.dtype)
    if geglu:
        value, gate = y.chunk(2, -1)
        y = value * F.gelu(gate)
    return y if residual is None else y + residual


def arguments(
    kind: str,
    dtype: torch.dtype,
    rows: tuple[int, ...] = (2, 5),
    inner: int = 12,
    out: int = 6,
    sliced: bool = False,
) -> dict[str, Any]:
    def make(*size: int) -> Tensor:
        if sliced:
            return torch.randn(*size[:-1], 2 * size[-1] + 1).to(dtype)[..., 1::2]
        return torch.randn(*size).to(dtype)

    found: dict[str, Any] = {"x": make(*rows, inner), "weight": make(out, inner)}
    if kind != "plain":
        found["bias"] = make(out)
    if "residual" in kind:
        found["residual"] = make(*rows, out // 2 if "geglu" in kind else out)
    if "geglu" in kind:
        found["geglu"] = True
    if "norm" in kind:
        x = found["x"].to(torch.promote_types(dtype, torch.float32))
        rstd = ((x - x.mean(-1, keepdim=True)).square().mean(-1) + 1e-5).rsqrt()
        sums = found["weight"].to(x.dtype).sum(1)
        found["norm"] = (x.mean(-1), rstd, sums)
    return found


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Statistics of a norm stay at least float32."""
    if isinstance(value, tuple):
        return tuple(v.to(torch.promote_types(dtype, torch.float32)) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


def outputs(call: Callable[..., Tensor], given: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients of all tensors."""
    given = {name: cast(value, dtype) for name, value in given.items()}
    leaves = []
    for name, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        fresh = tuple(v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in values)
        leaves += [v for v in fresh if isinstance(v, Tensor)]
        given[name] = fresh if isinstance(value, tuple) else fresh[0]
    y = call(**given)
    cotangent = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def operator(x: Tensor, weight: Tensor, **more: Any) -> Tensor:
    """The registered operator, with its own gradient."""
    norm = more.get("norm") or (None, None, None)
    rest = more.get("bias"), more.get("residual"), more.get("geglu", False)
    return OP(x, weight, *rest, *norm, ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(2, 5), (7,), (), (0, 3)])
def test_values_and_gradients(dtype: torch.dtype, kind: str, rows: tuple[int, ...]) -> None:
    given = arguments(kind, dtype, rows)
    truths, ordinary = outputs(plain, given, torch.float64), outputs(plain, given, dtype)
    for call in (ops.linear, operator):
        for result, truth, other in zip(outputs(call, given, dtype), truths, ordinary, strict=True):
            assert_close(result, truth, other)


def check_onednn(given: dict[str, Any], packed: Any = None) -> None:
    with ops.use_backend("onednn"):
        result = ops.linear(**given, packed=packed)
    truth = plain(**{name: cast(value, torch.float64) for name, value in given.items()})
    assert_close(result, truth, plain(**given))
    assert result.is_contiguous()


def check_onednn_gradients(given: dict[str, Any]) -> None:
    dtype = given["x"].dtype
    with ops.use_backend(linear="onednn"):
        results = outputs(ops.linear, given, dtype)
    truths, ordinary = outputs(plain, given, torch.float64), outputs(plain, given, dtype)
    for result, truth, other in zip(results, truths, ordinary, strict=True):
        assert_close(result, truth, other)


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "SMALL", 0)


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(3, 17), (33,), ()])
@pytest.mark.parametrize("form", ["dense", "sliced", "packed"])
def test_onednn(dtype: torch.dtype, kind: str, rows: tuple[int, ...], form: str) -> None:
    if dtype == torch.bfloat16 and "norm" in kind:
        pytest.skip("refused, see below")
    given = arguments(kind, dtype, rows, 40, 26, sliced=form == "sliced")
    packed = None
    if form == "packed":
        packed = ops.pack_linear(given["weight"], 51, geglu="geglu" in kind)
        assert packed is not None
    check_onednn(given, packed)
    if form != "packed":
        check_onednn_gradients(given)


@pytest.mark.usefixtures("_any_size")
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    inner=st.integers(1, 70),
    out=st.integers(1, 35).map(lambda n: 2 * n),
    kind=st.sampled_from(KINDS),
    sliced=st.booleans(),
)
def test_onednn_at_any_shape(rows: int, inner: int, out: int, kind: str, sliced: bool) -> None:
    given = arguments(kind, torch.float32, (rows,), inner, out, sliced)
    check_onednn(given)
    check_onednn_gradients(given)


def test_which_backend_runs_and_why() -> None:
    x, weight = torch.randn(64, 256), torch.randn(256, 256, requires_grad=True)
    choice = ops.explain("linear", x, weight)
    assert choice.rejected["onednn"] == "nothing was measured about such calls here"
    ops.linear(x, weight).sum().backward()
    assert ops.explain("linear").last_ran == "reference"
    with torch.no_grad():
        ops.linear(x, weight)
        assert ops.explain("linear", x, weight).last_ran == "onednn"
        assert "is faster" in ops.explain("linear", x, weight).rejected["reference"]
        small = ops.explain("linear", x[:3], weight)
        assert "multiply-adds" in small.rejected["onednn"]
        double = ops.explain("linear", x.double(), weight.double())
        assert "float64" in double.rejected["onednn"]
        norm = (*torch.randn(2, 64), weight[0])
        half = ops.explain("linear", x.bfloat16(), weight.bfloat16(), norm=norm)
        assert "round the product" in half.rejected["onednn"]
    with ops.use_backend("onednn"):
        ops.linear(x, weight).sum().backward()
    assert ops.explain("linear").last_ran == "onednn"


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    onednn.machine.cache_clear()
    onednn.supports.cache_clear()
    try:
        x = torch.randn(256, 256)
        assert ops.pack_linear(x, 256) is None
        ops.linear(x, x)
        assert ops.explain("linear").last_ran == "reference"
        assert "without oneDNN" in ops.explain("linear").rejected["onednn"]
    finally:
        onednn.machine.cache_clear()
        onednn.supports.cache_clear()


@pytest.mark.parametrize("geglu", [False, True])
@torch.no_grad()
def test_a_weight_packed_before_autocast(geglu: bool) -> None:
    x, weight = torch.randn(512, 256), torch.randn(256, 256)
    packed = ops.pack_linear(weight, 512, geglu=geglu)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ops.linear(x, weight, geglu=geglu)
        assert torch.equal(ops.linear(x, weight, geglu=geglu, packed=packed), expected)


@pytest.mark.parametrize("training", [False, True])
def test_follows_autocast_as_the_plain_function_does(training: bool) -> None:
    x, weight = torch.randn(64, 256), torch.randn(256, 256, requires_grad=training)
    residual = torch.randn(64, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight, residual=residual).dtype == torch.bfloat16
        assert_close(ops.linear(x, weight), F.linear(x, weight).double(), F.linear(x, weight))
        assert ops.linear(x.double(), weight.double()).dtype == torch.float64
    if training:
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.linear(x, weight).sum()
        assert torch.autograd.grad(y, weight)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_operator(kind: str) -> None:
    given = arguments(kind, torch.float64, (2, 3), 4, 6)
    norm = given.pop("norm", (None, None, None))
    order = [given.get(n) for n in ("x", "weight", "bias", "residual")]
    order += [given.get("geglu", False), *norm, []]
    order = [v.requires_grad_() if isinstance(v, Tensor) else v for v in order]
    torch.library.opcheck(OP, tuple(order))
    assert torch.autograd.gradcheck(OP, order)


def test_compiles_and_exports_whole() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
            return ops.linear(x, weight, residual=residual, geglu=True)

    values = torch.randn(3, 8), torch.randn(6, 8), torch.randn(3, 3)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*values), Block()(*values).double())
    assert "diffusion_fast.linear" in str(torch.export.export(Block(), values).graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4).int()}, "x: expected a floating point dtype"),
        ({"x": torch.tensor(1.0)}, r"x: expected shape \[..., K\], got \[\]"),
        ({"weight": torch.ones(6, 5)}, r"weight: expected shape \[N, K\] with K = 4, got \[6, 5\]"),
        ({"weight": torch.ones(6, 4).half()}, "weight: expected the dtype of x"),
        ({"bias": torch.ones(5)}, r"bias: expected shape \[N\] = \[6\], got \[5\]"),
        ({"weight": torch.ones(5, 4), "geglu": True}, "weight: expected an even number of rows"),
        ({"residual": torch.ones(2, 4)}, r"residual: expected shape \[..., N\] = \[2, 6\]"),
        ({"residual": torch.ones(2, 6), "geglu": True}, r"residual: .* = \[2, 3\]"),
        (
            {"norm": (torch.ones(3), torch.ones(2), torch.ones(6))},
            r"norm\[0\]: expected shape \[...\] of x = \[2\], got \[3\]",
        ),
        (
            {"norm": (torch.ones(2), torch.ones(2), torch.ones(6).half())},
            r"norm\[2\]: expected dtype torch.float32, got torch.float16",
        ),
        ({"packed": (torch.ones(6, 4),) * 2}, r"packed: expected what is made of a weight \[6, 4"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(2, 4), "weight": torch.ones(6, 4)}
    with pytest.raises(ValueError, match=message):
        ops.linear(**(given | change))


@pytest.mark.parametrize(
    ("weight", "rows", "geglu", "message"),
    [
        (torch.ones(4), 3, False, "weight: expected shape"),
        (torch.ones(3, 4), 3, True, "weight: expected shape"),
        (torch.ones(4, 4), 0, False, "rows: expected a positive integer"),
    ],
)
def test_bad_packing(weight: Tensor, rows: int, geglu: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack_linear(weight, rows, geglu=geglu)
