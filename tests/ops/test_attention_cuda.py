"""The CUDA backend of attention: what it takes and refuses, and (with a GPU) what it computes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops.attention import reference
from diffusion_fast.ops.cuda import attention as attention_cuda
from diffusion_fast.ops.cuda import build as extension
from diffusion_fast.ops.dispatch import BackendError, explain, use_backend

HALF = torch.float16


def tensors(
    batch: int = 2, queries: int = 8, keys: int = 5, heads: int = 2, head_dim: int = 40
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, queries, heads, head_dim).to(HALF)
    k, v = (torch.randn(batch, keys, heads, head_dim).to(HALF) for _ in range(2))
    return q, k, v


def why(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> str:
    return "; ".join(attention_cuda.supports(q, k, v, scale, bias))


# ---- what it takes and refuses: decided before any CUDA call


def test_refuses_other_dtypes_and_head_dims() -> None:
    q, k, v = tensors()
    assert "torch.float32" in why(q.float(), k.float(), v.float())
    q, k, v = tensors(head_dim=72)
    assert "head dim 72" in why(q, k, v)


@pytest.mark.parametrize("scale", (0.0, -1.0, 1e-40, 1e39))
def test_refuses_scales_without_a_float_inverse(scale: float) -> None:
    assert "scale" in why(*tensors(), scale=scale)


def test_refuses_layouts_the_kernels_cannot_read() -> None:
    q, k, v = tensors()
    assert "k is not contiguous in its last dim" in why(q, k.mT.contiguous().mT, v)
    odd = torch.randn(2, 5, 2, 41).to(HALF)[..., :40]
    assert "v has rows" in why(q, k, odd)


def test_where_a_tensor_begins_does_not_matter() -> None:
    """Only the launch sees addresses, and copies what begins at an odd one."""
    _, k, v = tensors()
    shifted = torch.randn(2 * 8 * 2 * 40 + 1).to(HALF)[1:].view(2, 8, 2, 40)
    assert "CUDA" in why(shifted, k, v)


def test_refuses_nothing_and_too_much() -> None:
    q, k, v = tensors()
    assert "empty" in why(q[:0], k[:0], v[:0])
    many = k[:, :1].expand(-1, 2**30 + 1, -1, -1)
    assert "rows" in why(q, many, many)


def test_strides_of_single_elements_do_not_matter() -> None:
    q, k, v = tensors(batch=1, heads=1)
    q = q.as_strided(q.shape, (3, 40, 7, 1))
    assert "CUDA" in why(q, k, v)  # nothing left to say but where the tensors are


def test_fused_projection_and_broadcast_are_taken() -> None:
    fused = torch.randn(2, 6, 3, 4, 40).to(HALF)
    assert "on a CUDA device" in why(*fused.unbind(2))
    q, k, v = tensors()
    assert "on a CUDA device" in why(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1, 5), (2, 2, 1, 5), (2, 1, 1, 1), ()])
def test_key_bias_becomes_float_with_strides(shape: tuple[int, ...]) -> None:
    q, k, v = tensors()
    bias = torch.randn(shape).to(HALF)
    assert "on a CUDA device" in why(q, k, v, bias=bias)
    full = attention_cuda._key_bias(bias, q, k)
    assert full is not None
    assert full.dtype == torch.float32
    assert full.stride(-1) == 1
    assert torch.equal(full, bias.float().expand(2, 2, 1, 5)[:, :, 0])


def test_refuses_a_bias_per_query() -> None:
    q, k, v = tensors()
    assert "differs by query" in why(q, k, v, bias=torch.zeros(8, 5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    (reason,) = attention_cuda.machine()
    assert explain("attention").rejected["cuda"] == reason
    assert explain("attention_backward").rejected["cuda"] == reason
    with use_backend("cuda"), pytest.raises(BackendError, match=r"cuda.*can't run"):
        ops.attention(*tensors())


class _Cuda:
    """A machine with a GPU, as far as :func:`attention_cuda.machine` asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(extension, "prebuilt", lambda: None)

    def unavailable(self) -> str:
        self.forget()
        try:
            return "; ".join(attention_cuda.machine())
        finally:
            self.forget()

    @staticmethod
    def forget() -> None:
        attention_cuda.machine.cache_clear()
        attention_cuda.gpu.cache_clear()


def test_old_gpus_and_missing_compilers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sm_75" in _Cuda(monkeypatch, (7, 5)).unavailable()
    ampere = _Cuda(monkeypatch, (8, 6))
    monkeypatch.setattr(extension, "toolchain", lambda: "no nvcc: install it")
    assert ampere.unavailable() == "no nvcc: install it"
    monkeypatch.setattr(extension, "toolchain", lambda: extension.Toolchain("nvcc", "g++", ""))
    assert not ampere.unavailable()


def test_of_two_gpus_the_newer_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Cuda(monkeypatch, (7, 5))
    capabilities = {None: (7, 5), 0: (7, 5), 1: (8, 9)}

    def capability(device: torch.device | int | None = None) -> tuple[int, int]:
        return capabilities[device.index if isinstance(device, torch.device) else device]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(extension, "toolchain", lambda: extension.Toolchain("nvcc", "g++", ""))
    # Which would allocate on them.
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda _: None)
    assert not machine.unavailable()
    with torch._subclasses.FakeTensorMode():
        old, new = (torch.empty(1, 8, 2, 40, dtype=HALF, device=f"cuda:{i}") for i in range(2))
        assert "sm_75" in why(old, old, old)
        assert not why(new, new, new)
    machine.forget()


@pytest.mark.parametrize("error", [extension.BuildError, ImportError, OSError])
def test_a_failed_build_is_a_reason_and_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise error("nvcc said no")

    monkeypatch.setattr(extension, "failures", {})
    monkeypatch.setattr(extension, "_library_for", fail)
    with pytest.warns(UserWarning, match="head dim 40: .*nvcc said no") as warned:
        reasons = [extension.load(40) for _ in range(2)]
    assert all("nvcc said no" in reason for (reason,) in reasons)
    assert len(tries) == len(warned) == 1


# ---- what it computes

KEYS = (1, 15, 16, 17, 77, 154, 231, 256, 257, 1000)
gpu = pytest.mark.gpu


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    batch, rows, heads, head_dim = shape
    size = (batch, rows + 1, heads + 1, head_dim + 8)
    storage = torch.full(size, math.nan, dtype=dtype, device="cuda")
    view = storage[:, 1:, 1:, 8:]
    return view.copy_(torch.randn(shape, device="cuda"))


def check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None
) -> None:
    """Output and gradients of the op against float64 and plain PyTorch."""
    scale = q.shape[-1] ** -0.5
    dout = torch.randn_like(q, memory_format=torch.contiguous_format)

    def run(dtype: torch.dtype, through_op: bool) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        wide = None if bias is None else bias.to(dtype).detach().requires_grad_()
        if through_op:
            with use_backend("cuda"):
                out = ops.attention(*leaves, bias=wide, key_lengths=lengths)
                inputs = leaves if wide is None else [*leaves, wide]
                return [out, *torch.autograd.grad(out, inputs, dout)]
        out, _ = reference(*leaves, scale, wide, lengths, False)
        inputs = leaves if wide is None else [*leaves, wide]
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]

    results, truths, plains = (
        run(q.dtype, True),
        run(torch.float64, False),
        run(q.dtype, False),
    )
    for i, (result, truth, plain) in enumerate(zip(results, truths, plains, strict=True)):
        assert_close(result, truth, plain, factor=3 if i else 2)


@gpu
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("head_dim", extension.HEAD_DIMS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_against_float64(dtype: torch.dtype, head_dim: int, keys: int) -> None:
    queries = 2 * keys // 3 * 2 + 1  # odd
    q = strided(2, queries, 3, head_dim, dtype=dtype)
    k, v = (strided(2, keys, 3, head_dim, dtype=dtype) for _ in range(2))
    check(q, k, v)


@gpu
@pytest.mark.parametrize("queries", (65, 4096))
@pytest.mark.parametrize("head_dim", (40, 64, 160))
def test_one_prompt_for_many_images_with_bias_and_lengths(head_dim: int, queries: int) -> None:
    q = strided(3, queries, 2, head_dim, dtype=torch.bfloat16)
    k, v = (strided(1, 77, 2, head_dim, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(1, 2, 1, 77, device="cuda", dtype=torch.bfloat16)
    check(q, k, v, bias, torch.tensor([77, 9, 1], device="cuda"))


@gpu
def test_kernels_agree_where_both_can_run() -> None:
    q, k, v = (strided(2, 200, 4, 64, dtype=torch.bfloat16) for _ in range(3))
    assert extension.load(64) == []
    results = [attention_cuda.forward(q, k, v, 0.125, None, None, True, i) for i in (1, 2)]
    truth, lse = reference(q.double(), k.double(), v.double(), 0.125, None, None, True)
    plain, _ = reference(q, k, v, 0.125, None, None, True)
    for out, got_lse in results:
        assert_close(out, truth, plain)
        assert_close(got_lse, lse)


@gpu
def test_opcheck() -> None:
    q, k, v = (strided(1, 40, 2, 40, dtype=HALF).requires_grad_() for _ in range(3))
    with use_backend("cuda"):
        torch.library.opcheck(
            torch.ops.diffusion_fast.attention.default, (q, k, v, 0.2, None, None, True)
        )


@gpu
def test_repeats_are_equal_bit_for_bit() -> None:
    q = strided(2, 1000, 2, 40, dtype=torch.bfloat16).requires_grad_()
    k, v = (strided(2, 77, 2, 40, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    dout = torch.randn(q.shape, device="cuda", dtype=q.dtype)
    first: list[Tensor] | None = None
    for _ in range(5):
        with use_backend("cuda"):
            out = ops.attention(q, k, v)
            results = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        for a, b in zip(first or results, results, strict=True):
            assert torch.equal(a, b)
        first = results


@gpu
def test_compiles() -> None:
    q, k, v = (strided(2, 64, 2, 40, dtype=HALF) for _ in range(3))
    with use_backend("cuda"):
        compiled = torch.compile(lambda *x: ops.attention(*x) * 2, fullgraph=True)
        assert torch.equal(compiled(q, k, v), ops.attention(q, k, v) * 2)


@gpu
def test_captured_in_a_graph() -> None:
    q = strided(2, 300, 2, 40, dtype=HALF).requires_grad_()
    keys = (strided(2, n, 2, 40, dtype=HALF) for n in (77, 256, 300))  # both kernels, two sizes
    dout = torch.randn(q.shape, device="cuda", dtype=q.dtype)
    prompts = [k.requires_grad_() for k in keys]

    def run() -> list[Tensor]:
        results = []
        for k in prompts:
            out = ops.attention(q, k, k)
            results += [out.detach(), *torch.autograd.grad(out, (q, k), dout)]
        return results

    with use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # builds and loads
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            q.copy_(torch.randn_like(q))
        graph.replay()
        for replayed, eager in zip(captured, run(), strict=True):
            assert torch.equal(replayed, eager)


@gpu
def test_runs_on_the_current_stream() -> None:
    q, k, v = (strided(1, 64, 1, 40, dtype=HALF) for _ in range(3))
    with use_backend("cuda"):
        expected = ops.attention(q, k, v)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            q2 = q + 0
            got = ops.attention(q2, k, v)
        stream.synchronize()
    assert torch.equal(got, expected)


@gpu
def test_offsets_past_two_to_the_31() -> None:
    rows, heads, head_dim = 64, 1, 32
    row_stride = 2**31 // 32 // 8 * 8
    storage = torch.empty(row_stride * rows + head_dim, dtype=HALF, device="cuda")
    far = storage.as_strided((1, rows, heads, head_dim), (0, row_stride, head_dim, 1))
    far.copy_(torch.randn(far.shape))
    near = far.contiguous()
    with use_backend("cuda"):
        assert torch.equal(ops.attention(far, far, far), ops.attention(near, near, near))


@gpu
def test_nan_stays_in_its_row() -> None:
    q, k, v = (strided(1, 77, 2, 40, dtype=HALF) for _ in range(3))
    q[0, 5, 1] = math.nan
    with use_backend("cuda"):
        out = ops.attention(q, k, v)
    assert out[0, 5, 1].isnan().all()
    out[0, 5, 1] = 0
    assert out.isfinite().all()


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck", "initcheck"))
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer (the CUDA toolkit)")
    code = """
import torch
from diffusion_fast import ops
for queries, keys in ((65, 77), (33, 257)):
    q = torch.randn(1, queries, 2, 40, device="cuda").half().requires_grad_()
    k, v = (torch.randn(1, keys, 2, 40, device="cuda").half().requires_grad_() for _ in range(2))
    with ops.use_backend("cuda"):
        ops.attention(q, k, v).sum().backward()
torch.cuda.synchronize()
"""
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kns=attention_",
    ]
    command += [sys.executable, "-c", code]
    # What PyTorch caches is one allocation to the checker, whatever tensors lie in it.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
