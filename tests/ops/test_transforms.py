"""torch.func over the ops gives what it gives over the functions that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops

LENGTHS = torch.tensor([3, 2])


def heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def norm(x: Tensor, w: Tensor, b: Tensor, add: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + add[..., None, None], 2, w, b))


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]]
CASES = {
    "group_norm_silu": (
        lambda x, w, b, add: ops.group_norm_silu(x, 2, w, b, add=add),
        norm,
        ((2, 4, 5, 3), (4,), (4,), (2, 4)),
    ),
    "group_norm_silu of two sources": (
        lambda x, y, w, b: ops.group_norm_silu(x, 2, w, b, silu=False, x2=y),
        lambda x, y, w, b: F.group_norm(torch.cat((x, y), 1), 2, w, b),
        ((2, 4, 5), (2, 2, 5), (6,), (6,)),
    ),
    "conv2d": (
        lambda x, w, b: ops.conv2d(x, w, b, stride=2, padding=(0, 1, 0, 1)),
        lambda x, w, b: F.conv2d(F.pad(x, (0, 1, 0, 1)), w, b, 2),
        ((2, 4, 6, 6), (3, 4, 3, 3), (3,)),
    ),
    "a pointwise conv2d": (
        lambda x, w, r: ops.conv2d(x, w, residual=r),
        lambda x, w, r: F.conv2d(x, w) + r,
        ((2, 64, 16, 16), (128, 64, 1, 1), (2, 128, 16, 16)),
    ),
    "layer_norm": (
        lambda x, w, b: ops.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, (4,), w, b),
        ((2, 5, 4), (4,), (4,)),
    ),
    "geglu": (ops.geglu, lambda x: x[..., :2] * F.gelu(x[..., 2:]), ((2, 5, 4),)),
    "linear": (ops.linear, F.linear, ((64, 256), (256, 256), (256,))),
    "linear with a gate": (
        lambda x, w: ops.linear(x, w, geglu=True),
        lambda x, w: F.linear(x, w[:3]) * F.gelu(F.linear(x, w[3:])),
        ((5, 4), (6, 4)),
    ),
    "residual": (
        lambda x, r, b: ops.residual(x, r, b, 0.5),
        lambda x, r, b: (x + r + b[:, None]) * 0.5,
        ((2, 4, 3), (2, 4, 3), (4,)),
    ),
    "row_statistics": (
        lambda x: ops.row_statistics(x)[1],
        lambda x: (x.var(-1, correction=0) + 1e-5).rsqrt(),
        ((3, 5, 8),),
    ),
    "weighted_mse": (
        ops.weighted_mse,
        lambda p, t, w: (w[:, None] * (p - t) ** 2).mean(),
        ((2, 5), (2, 5), (2,)),
    ),
    "attention": (
        lambda q, k, v: ops.attention(q, k, v),
        lambda q, k, v: heads(F.scaled_dot_product_attention(*map(heads, (q, k, v)))),
        ((2, 4, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8)),
    ),
    "decoupled_attention": (
        lambda q, k, v, w: ops.decoupled_attention(q, k, v, (2, 1), w),
        lambda q, k, v, w: (
            heads(F.scaled_dot_product_attention(heads(q), heads(k)[:, :, :2], heads(v)[:, :, :2]))
            + v[:, 2:] * w[:, 0, :, None, None]  # the softmax of one key is 1
        ),
        ((2, 4, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8), (2, 1, 4)),
    ),
    "attention of one length": (
        lambda q, k, v: ops.attention(q, k, v, key_lengths=LENGTHS - LENGTHS + 2),
        lambda q, k, v: heads(
            F.scaled_dot_product_attention(heads(q), heads(k)[:, :, :2], heads(v)[:, :, :2])
        ),
        ((2, 4, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8)),
    ),
}


@pytest.mark.parametrize("of", ["values", "gradients", "gradients outside"])
@pytest.mark.parametrize("name", CASES)
def test_vmap(name: str, of: str) -> None:
    ours, theirs, shapes = CASES[name]
    values = [torch.randn(3, *shape, dtype=torch.float64) for shape in shapes]

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def total(*inputs: Tensor) -> Tensor:
            return function(*inputs).square().sum()

        everything = tuple(range(len(values)))
        if of == "values":
            return (torch.func.vmap(function)(*values),)
        if of == "gradients":
            return torch.func.vmap(torch.func.grad(total, everything))(*values)
        sums = torch.func.vmap(total)
        return torch.func.grad(lambda *inputs: sums(*inputs).sum(), everything)(*values)

    for result, truth in zip(run(ours), run(theirs), strict=True):
        assert_close(result, truth)


def test_shared_parameters_and_a_batch_that_lies_last() -> None:
    x, w, b = torch.randn(2, 4, 5, 3, 6), torch.randn(4), torch.randn(4)
    dims = (4, None, None)
    result = torch.func.vmap(lambda x, w, b: ops.group_norm_silu(x, 2, w, b), dims)(x, w, b)
    plain = torch.func.vmap(lambda x, w, b: F.silu(F.group_norm(x, 2, w, b)), dims)
    assert_close(result, plain(x.double(), w.double(), b.double()), plain(x, w, b))


def test_what_has_no_vmap_is_refused_by_name() -> None:
    with (
        ops.use_backend(linear="onednn"),
        pytest.raises(ops.BackendError, match=r"torch\.func"),
    ):
        torch.func.vmap(ops.linear)(torch.randn(3, 64, 256), torch.randn(3, 256, 256))
