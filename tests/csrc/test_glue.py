"""The Python side of the CUDA backend, run without a GPU: its ops replaced by the emulator's."""

from __future__ import annotations

import emulated_attention as emulated
import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast.ops.attention import reference
from diffusion_fast.ops.cuda import attention as attention_cuda

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)")

HEAD_DIM = 40


class EmulatedOps:
    """Stands for torch.ops.diffusion_fast_cuda.attention_*: the same arguments, in their order."""

    def __init__(self, splits: int) -> None:
        self.chosen_splits = splits

    def __call__(self, name: str, head_dim: int) -> object:
        assert head_dim == HEAD_DIM
        return getattr(self, name)

    def splits(self, batch_heads: int, queries: int, keys: int, device: int) -> int:
        assert batch_heads > 0
        return self.chosen_splits

    @staticmethod
    def forward(*arguments: object) -> None:
        names = ["q", "k", "v", "bias", "key_lengths", "out", "lse"]
        tensors = dict(zip(names, arguments, strict=False))
        scale, kernel, _ = arguments[len(names) :]
        numbers = {"backward": 0, "kernel": kernel, "scale": scale}
        EmulatedOps._run(tensors, numbers)

    @staticmethod
    def backward(*arguments: object) -> None:
        names = "dout q k v out lse bias key_lengths delta dq dk dv dk_parts dv_parts dbias_parts"
        tensors = dict(zip(names.split(), arguments, strict=False))
        scale, splits, _ = arguments[len(tensors) :]
        EmulatedOps._run(tensors, {"backward": 1, "splits": splits, "scale": scale})

    @staticmethod
    def _run(tensors: dict, numbers: dict) -> None:
        q, k, bias = tensors["q"], tensors["k"], tensors["bias"]
        if tensors["key_lengths"] is not None:
            assert tensors["key_lengths"].dtype == torch.int32
        if bias is not None:
            assert bias.shape == (q.shape[0], q.shape[2], k.shape[1])
            tensors["bias"] = bias[:, :, None]
        if tensors["lse"].numel() == 0:
            tensors["lse"] = None
        for name, value in tensors.items():
            written = "out" if numbers["backward"] == 0 else "dq dk dv dk_parts dv_parts"
            if name in written.split() and value is not None:
                value.fill_(torch.nan)
        shape = {"batch": q.shape[0], "heads": q.shape[2], "queries": q.shape[1]}
        sizes = {**shape, "keys": k.shape[1], "seed": 0, **emulated._numbers(emulated.H200)}
        call = emulated.Call(tensors, {**numbers, **sizes})
        call.run(emulated.build(HEAD_DIM, q.dtype))


def grads_of(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: object
) -> list[Tensor]:
    scale, lengths, dout = rest
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    wide = None if bias is None else bias.to(dtype, copy=True).requires_grad_()
    out, _ = reference(*leaves, scale, wide, lengths, False)
    inputs = leaves if wide is None else [*leaves, wide]
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype))]


@pytest.mark.parametrize("splits", (1, 2))
@pytest.mark.parametrize("shared", (False, True), ids=("own-keys", "shared-keys"))
@pytest.mark.parametrize("bias_shape", (None, (77,), (2, 1, 77), (3, 1, 1, 77), (1, 2, 1, 1)))
def test_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, splits: int, shared: bool, bias_shape: tuple[int, ...] | None
) -> None:
    monkeypatch.setattr(attention_cuda, "_op", EmulatedOps(splits))
    monkeypatch.setattr(attention_cuda, "_stream", lambda _: 0)
    q = torch.randn(3, 70, 2, HEAD_DIM).bfloat16()
    k, v = (torch.randn(1 if shared else 3, 77, 2, HEAD_DIM).bfloat16() for _ in range(2))
    bias = None if bias_shape is None else torch.randn(bias_shape).bfloat16()
    lengths = torch.tensor([77, 30, 5])
    scale = 0.2
    dout = torch.randn(2, 70, 3, HEAD_DIM).bfloat16().transpose(0, 2)  # not contiguous
    out, lse = attention_cuda.forward(q, k, v, scale, bias, lengths, True)
    grads = attention_cuda.backward(dout, q, k, v, out, lse, scale, bias, lengths)
    results = [out, *grads] if bias is not None else [out, *grads[:3]]
    truths = grads_of(torch.float64, q, k, v, bias, scale, lengths, dout)
    plains = grads_of(q.dtype, q, k, v, bias, scale, lengths, dout)
    for i, (result, truth, plain) in enumerate(zip(results, truths, plains, strict=True)):
        assert result.dtype == q.dtype
        assert result.is_contiguous()
        assert_close(result, truth, plain, factor=3 if i else 2)
    if bias is None:
        assert grads[3].numel() == 0


def test_tensors_that_begin_at_odd_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, and yet the kernels can't read them in place."""
    monkeypatch.setattr(attention_cuda, "_op", EmulatedOps(1))
    monkeypatch.setattr(attention_cuda, "_stream", lambda _: 0)
    q, k, v = (torch.randn(1, 20, 2, HEAD_DIM).half() for _ in range(3))
    dout = torch.randn(q.numel() + 1).half()[1:].view(q.shape)
    assert dout.is_contiguous()
    odd = (torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (q, k, v))
    moved = attention_cuda.forward(*odd, 0.2, None, None, True)
    out, lse = attention_cuda.forward(q, k, v, 0.2, None, None, True)
    shifted = attention_cuda.backward(dout, q, k, v, out, lse, 0.2, None, None)
    aligned = attention_cuda.backward(dout.clone(), q, k, v, out, lse, 0.2, None, None)
    for one, other in zip((*shifted, *moved), (*aligned, out, lse), strict=True):
        assert torch.equal(one, other)


def test_without_a_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "_op", EmulatedOps(1))
    monkeypatch.setattr(attention_cuda, "_stream", lambda _: 0)
    q, k, v = (torch.randn(1, 20, 2, HEAD_DIM).half() for _ in range(3))
    out, lse = attention_cuda.forward(q, k, v, 0.2, None, None, False)
    assert lse.shape == (0,)
    truth, _ = reference(q.double(), k.double(), v.double(), 0.2, None, None, False)
    plain, _ = reference(q, k, v, 0.2, None, None, False)
    assert_close(out, truth, plain)


def test_fake_cuda_tensors_get_shapes_without_a_device() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 64, 4, HEAD_DIM, dtype=torch.float16, device="cuda")
        k = torch.empty(1, 77, 4, HEAD_DIM, dtype=torch.float16, device="cuda")
        op = torch.ops.diffusion_fast.attention
        out, lse = op(q, k, k, 0.1, None, None, True)
        assert out.shape == q.shape
        assert out.device.type == "cuda"
        assert lse.shape == (2, 4, 64)
        backward = torch.ops.diffusion_fast.attention_backward
        dq, dk, dv, dbias = backward(out, q, k, k, out, lse, 0.1, None, None)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
        assert dbias.numel() == 0
