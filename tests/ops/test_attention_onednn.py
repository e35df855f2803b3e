"""Attention as oneDNN's products: values over long sequences, and which calls it leaves alone."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops import onednn

pytestmark = pytest.mark.skipif(bool(onednn.machine()), reason="this PyTorch has no oneDNN")


def reference(*args: Tensor, **more: Tensor | float | None) -> Tensor:
    with ops.use_backend("reference"):
        return ops.attention(*args, **more)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "dim"),
    [
        pytest.param(1, 256, 256, 3, 160, id="one block"),
        pytest.param(2, 700, 3000, 1, 24, id="blocks that do not divide the queries"),
        pytest.param(1, 4096, 77, 2, 40, id="a prompt"),
        pytest.param(1, 300, 300, 1, 512, id="an autoencoder"),
    ],
)
@pytest.mark.parametrize("case", ["plain", "lengths", "shared", "fused", "scale"])
def test_values(batch: int, queries: int, keys: int, heads: int, dim: int, case: str) -> None:
    q = torch.randn(batch, queries, heads, dim) * 3
    of_keys = 1 if case == "shared" else batch
    k, v = torch.randn(of_keys, keys, heads, 2 * dim).chunk(2, dim=-1)
    if case == "fused":
        q = torch.randn(batch, queries, 3, heads, dim)[:, :, 1]
    more: dict[str, Tensor | float | None] = {}
    if case == "lengths":
        more["key_lengths"] = torch.tensor([keys - 5, 1][:batch])
    if case == "scale":
        more["scale"] = 0.3
    with torch.no_grad():
        with ops.use_backend(attention="onednn"):
            out = ops.attention(q, k, v, **more)
        truth = reference(q.double(), k.double(), v.double(), **more)
        assert_close(out, truth, reference(q, k, v, **more))
    assert out.is_contiguous()


@torch.no_grad()
def test_a_nan_stays_in_its_row() -> None:
    q, k, v = torch.randn(3, 1, 512, 2, 40).unbind()
    q[0, 300, 1, 5] = float("nan")
    with ops.use_backend(attention="onednn"):
        bad = ops.attention(q, k, v).isnan()
    assert bad[0, 300, 1].all()
    assert bad.sum() == 40


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("multiply-adds", {"keys": 16}),
        ("256 queries", {"queries": 255}),
        ("rounded", {"dtype": torch.bfloat16}),
        ("rounded", {"dtype": torch.float64}),
        ("bias", {"bias": torch.zeros(512)}),
        ("gradient", {"requires_grad": True}),
    ],
)
def test_what_it_leaves_to_others(reason: str, change: dict) -> None:
    given = {"queries": 512, "keys": 512, "dtype": torch.float32, "bias": None} | change
    q = torch.randn(1, given["queries"], 2, 64, dtype=given["dtype"])
    k = torch.randn(1, given["keys"], 2, 64, dtype=given["dtype"])
    q.requires_grad_(given.get("requires_grad", False))
    ops.attention(q, k, k, bias=given["bias"])
    assert ops.explain("attention").last_ran in ("sdpa", "cpu")
    choice = ops.explain("attention", q, k, k, bias=given["bias"])
    assert reason in choice.rejected["onednn"]
    with ops.use_backend(attention="onednn"), pytest.raises(ops.BackendError, match=reason):
        ops.attention(q, k, k, bias=given["bias"])
