"""Ops under torch.autocast: what PyTorch's functions take, with their values and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.ops.dispatch import autocast

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
Call = Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Written out: PyTorch's fused kernels round their weights on some CPUs, and on some not."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, add: Any = None, scale: Any = None) -> Any:
    x = x if add is None else x + add[..., None, None]
    y = F.group_norm(x, 2, weight.to(x.dtype), bias.to(x.dtype))
    return F.silu(y if scale is None else y * (1 + scale[..., None, None]))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))


# op -> (ours, PyTorch's, shapes of the tensors)
IMAGE, ROWS, C = (2, 4, 5, 3), (2, 7, 4), (4,)
QKV, KEYS = (2, 24, 2, 16), (24,)
OPS: dict[str, tuple[Call, Call, tuple[tuple[int, ...], ...]]] = {
    "group_norm_silu": (
        lambda x, w, b: ops.group_norm_silu(x, 2, w, b),
        group_norm,
        (IMAGE, C, C),
    ),
    "group_norm_silu with its neighbours": (
        lambda x, w, b, add, scale: ops.group_norm_silu(x, 2, w, b, add=add, scale=scale),
        group_norm,
        (IMAGE, C, C, (2, 4), (2, 4)),
    ),
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b), layer_norm, (ROWS, C, C)),
    "geglu": (ops.geglu, lambda x: x[..., :2] * F.gelu(x[..., 2:]), (ROWS,)),
    "residual": (
        lambda x, r, b: ops.residual(x, r, b, scale=0.5),
        lambda x, r, b: (x + r + b[:, None, None]) * 0.5,
        (IMAGE, IMAGE, C),
    ),
    "linear": (ops.linear, F.linear, (ROWS, (6, 4), (6,))),
    "conv2d": (
        lambda x, w, b: ops.conv2d(x, w, b, padding=1),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        (IMAGE, (6, 4, 3, 3), (6,)),
    ),
    "attention": (lambda q, k, v: ops.attention(q, k, v), attention, (QKV, QKV, QKV)),
    "decoupled_attention": (
        lambda q, k, v: ops.decoupled_attention(q, k, v, (2, k.shape[1] - 2), torch.ones(1, 1, 1)),
        lambda q, k, v: attention(q, k[:, :2], v[:, :2]) + attention(q, k[:, 2:], v[:, 2:]),
        (QKV, QKV, QKV),
    ),
    "attention with a bias": (
        lambda q, k, v, bias: ops.attention(q, k, v, bias=bias),
        attention,
        (QKV, QKV, QKV, KEYS),
    ),
    "weighted_mse": (ops.weighted_mse, F.mse_loss, (IMAGE, IMAGE)),
}


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(list(OPS)), half=st.sampled_from(HALF), data=st.data())
def test_any_mixture_of_dtypes(name: str, half: torch.dtype, data: st.DataObject) -> None:
    """Values and dtype of PyTorch's own functions, and gradients in the dtype of each tensor."""
    ours, theirs, shapes = OPS[name]
    # Activations come in one of the two dtypes each; a mixture may stand anywhere.
    dtypes = [data.draw(st.sampled_from((half, torch.float32))) for _ in shapes]
    torch.manual_seed(data.draw(st.integers(0, 9)))
    values = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    leaves = [v.clone().requires_grad_() for v in values]
    with torch.autocast("cpu", half):
        result, plain = ours(*leaves), theirs(*values)
    truth = theirs(*(v.double() for v in values))
    assert result.dtype == plain.dtype
    assert_close(result.detach(), truth, plain)
    for leaf, gradient in zip(leaves, torch.autograd.grad(result.sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


def test_parameters_keep_their_digits_beside_half_activations() -> None:
    """As in F.group_norm on a CPU, which reads float32 weights beside a bfloat16 input."""
    x, weight = torch.randn(2, 4, 5, 3).bfloat16(), torch.tensor([1.0, 1.001, 1.002, 1.003])
    with torch.autocast("cpu", torch.bfloat16):
        gradients = []
        for call in (ops.group_norm_silu, lambda x, n, w, b: F.silu(F.group_norm(x, n, w, b))):
            leaf = weight.clone().requires_grad_()
            gradients.append(torch.autograd.grad(call(x, 2, leaf, leaf).sum(), leaf)[0])
    assert gradients[0].dtype == torch.float32
    assert_close(gradients[0], gradients[1].double(), gradients[1].bfloat16())


def test_noise_beside_half_data() -> None:
    x, noise, tables = torch.randn(2, 3).half(), torch.randn(2, 3), torch.rand(2, 5)
    t = torch.tensor([1, 4])
    with torch.autocast("cpu", torch.float16):
        x_t, v = ops.add_noise(x, noise, t, *tables, target="v_prediction")
    expected = ops.add_noise(x.float(), noise, t, *tables, target="v_prediction")
    assert torch.equal(x_t, expected[0])
    assert torch.equal(v, expected[1])


def test_on_a_gpu_norms_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is where PyTorch's autocast puts them there; nothing is computed here."""

    class OnGpu:
        device = torch.device("cuda", 0)

        def __init__(self, value: Tensor) -> None:
            self.value = value

    x, weight = torch.ones(2, 4).bfloat16(), torch.ones(4).bfloat16()
    monkeypatch.setattr(autocast, "widest", lambda *values: torch.bfloat16)
    values, dtype = autocast.norm(OnGpu(x), (x,), (weight,))  # type: ignore[arg-type]
    assert [v.dtype for v in values] == [torch.float32] * 2
    assert dtype == torch.float32


@pytest.mark.parametrize("name", OPS)
def test_without_autocast_a_mixture_is_refused(name: str) -> None:
    ours, _, shapes = OPS[name]
    if len(shapes) > 1:
        values = [torch.randn(shapes[0]).bfloat16(), *(torch.randn(shape) for shape in shapes[1:])]
        with pytest.raises(ValueError, match="dtype"):
            ours(*values)


@pytest.mark.parametrize("name", ["group_norm_silu", "linear", "residual"])
def test_compiled(name: str) -> None:
    ours, _, shapes = OPS[name]
    values = [torch.randn(shapes[0]).bfloat16(), *(torch.randn(shape) for shape in shapes[1:])]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, expected = compiled(*values), ours(*values)
    assert result.dtype == expected.dtype
    assert_close(result, expected.double(), expected)
