"""The product's kernel as a linear layer: epilogues, gates, folded norms, parts of the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, check, randn
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import matmul, product

KINDS = ("plain", "bias", "residual", "geglu", "geglu residual", "norm", "norm geglu")
SMALL = matmul.Config(16, 16, 16, 4, 2)


def case(
    kind: str,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    inner: int,
    out: int,
    layout: str = "contiguous",
) -> tuple[Any, dict[str, Tensor]]:
    """A call and its tensors."""
    values = {
        "x": randn(*rows, inner, dtype=dtype, layout=layout),
        "weight": randn(out, inner, dtype=dtype, layout=layout),
    }
    if kind != "plain":
        values["bias"] = randn(out, dtype=dtype)
    if "residual" in kind:
        width = out // 2 if "geglu" in kind else out
        values["residual"] = randn(*rows, width, dtype=dtype, layout=layout)
    if "norm" in kind:
        wide = torch.promote_types(dtype, torch.float32)
        mean, rstd = randn(2, *rows, dtype=wide)
        values |= {"mean": mean, "rstd": rstd.exp()}
        values["sums"] = values["weight"].to(wide).sum(1)

    def call(x: Tensor, weight: Tensor, **more: Tensor) -> Tensor:
        norm = tuple(more[n] for n in ("mean", "rstd", "sums")) if "mean" in more else None
        rest = {name: more.get(name) for name in ("bias", "residual")}
        return ops.linear(x, weight, geglu="geglu" in kind, norm=norm, **rest)

    return call, values


@pytest.fixture(params=["small", "parts"])
def _config(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def configs(p: product.Product) -> list[matmul.Config]:
        cut = request.param == "parts" and not p.geglu
        return [SMALL._replace(parts=3 if cut else 1)]

    monkeypatch.setattr(matmul, "configs", configs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_values(dtype: torch.dtype, kind: str, layout: str) -> None:
    check(*case(kind, dtype, (2, 19), 45, 38, layout))


@pytest.mark.usefixtures("_config")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_and_parts(dtype: torch.dtype, kind: str) -> None:
    check(*case(kind, dtype, (19,), 45, 38), repeat=kind == "bias")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_gradients(dtype: torch.dtype, kind: str) -> None:
    call, values = case(kind, dtype, (3, 5), 12, 10)
    check(call, values, tuple(values))


@pytest.mark.parametrize("rows", [(), (1,), (0, 3)])
@pytest.mark.parametrize("kind", ["residual", "norm geglu"])
def test_one_row_and_none(rows: tuple[int, ...], kind: str) -> None:
    call, values = case(kind, torch.float32, rows, 5, 4)
    check(call, values)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 40),
    out=st.integers(1, 20).map(lambda n: 2 * n),
    kind=st.sampled_from(KINDS),
    parts=st.integers(1, 5),
)
def test_any_shape(rows: int, inner: int, out: int, kind: str, parts: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        config = SMALL._replace(parts=1 if "geglu" in kind else parts)
        patch.setattr(matmul, "configs", lambda p: [config])
        check(*case(kind, torch.float32, (rows,), inner, out))


def test_a_folded_norm_of_a_large_mean() -> None:
    """Row means of ten standard deviations: the product is not rounded before they are removed."""
    x = 10 + randn(32, 64, dtype=torch.bfloat16).float()
    x = x.bfloat16()
    gamma, weight = randn(64, dtype=torch.float32), randn(24, 64, dtype=torch.float32)
    folded = (weight * gamma).bfloat16()
    mean, variance = x.float().mean(1), x.float().var(1, correction=0)
    norm = mean, (variance + 1e-5).rsqrt(), folded.float().sum(1)
    with ops.use_backend("triton"):
        y = ops.linear(x, folded, norm=norm)
    u = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-5)
    truth = u @ folded.double().mT
    assert (y.double() - truth).abs().max() <= 2**-7 * truth.abs().max()


def test_large_values_stay_finite_in_half_precision() -> None:
    x = torch.full((4, 64), 200.0, device=randn(1, dtype=torch.half).device).half()
    with ops.use_backend("triton"):
        y = ops.linear(x, x / 200, residual=None)
    assert y.eq(12800).all()


def test_candidates_differ_and_fit_the_shape() -> None:
    """A shape with few tiles is cut in parts, a gated one never is."""

    def found(rows: int, columns: int, inner: int, geglu: bool) -> list[matmul.Config]:
        x = torch.empty(rows, inner, dtype=torch.bfloat16, device="meta")
        p = product.Product(
            x, (0, 1, 0, inner), None, (0,) * 4, x, (inner, 1, 0, 0), x, (0, columns, 1), (), None,
            (rows, columns, rows), (inner, 0), (1, rows), rows, (1, 1), 1, (0, 0), geglu,
        )  # fmt: skip
        configs = matmul.configs(p)
        assert len(set(configs)) == len(configs)
        return configs

    assert found(8192, 2560, 320, False)[0] == matmul.Config(128, 128, 64, 8, 3)
    assert found(128, 1280, 5120, False)[0].parts > 1
    assert all(c.parts == 1 for c in found(128, 5120, 1280, True))
    # The convolutions of 16x16 and 32x32 pixels: too few tiles for 132 multiprocessors.
    for rows, columns, inner in ((512, 1280, 11520), (2048, 640, 5760)):
        configs = found(rows, columns, inner, False)
        tiles = -(-rows // 128) * -(-columns // 128)
        parts = {c.parts for c in configs if (c.m, c.n) == (128, 128)}
        assert {n for n in (2, 3, 4, 6) if n * tiles <= 2.3 * 132} <= parts
