"""The Hopper attention kernel on an sm_90 GPU, where it has to prove itself.

    python -m pytest tests/csrc/test_hopper_fragments.py tests/csrc/test_hopper_on_gpu.py -m gpu -x

The order is that of the questions: do the building blocks give the emulator's bits, does the
smallest call end at all (in a process of its own, as a kernel that hangs can't be stopped), is it
right on odd sizes, is it right on the real shapes, does it always give the same bits.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast.ops.attention import reference
from diffusion_fast.ops.cuda import attention as attention_cuda
from diffusion_fast.ops.cuda import build as extension

pytestmark = pytest.mark.gpu
HOPPER = 3

# Queries, keys, heads, head dim at batch 2: Stable Diffusion 1.5, then XL; one prompt as keys too.
SHAPES = [
    (4096, 4096, 8, 40),
    (1024, 1024, 8, 80),
    (256, 256, 8, 160),
    (64, 64, 8, 160),
    (4096, 4096, 10, 64),
    (1024, 1024, 20, 64),
    (4096, 77, 8, 40),
    (1024, 231, 20, 64),
]


@pytest.fixture(autouse=True)
def _hopper_only() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")


def strided(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random [B, S, H, D] inside a larger tensor of NaN."""
    batch, rows, heads, head_dim = shape
    size = (batch, rows + 1, heads + 1, head_dim + 8)
    storage = torch.full(size, math.nan, dtype=dtype, device="cuda")
    return storage[:, 1:, 1:, 8:].copy_(torch.randn(shape, device="cuda"))


def run(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    assert not extension.load(q.shape[-1])
    scale = q.shape[-1] ** -0.5
    return attention_cuda.forward(q, k, v, scale, bias, lengths, True, HOPPER)


def check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None
) -> None:
    out, lse = run(q, k, v, bias, lengths)
    scale = q.shape[-1] ** -0.5
    assert out.isfinite().all()
    for head in range(q.shape[2]):  # one at a time: float64 scores of 4096 x 4096 are large
        q1, k1, v1 = (x[:, :, head : head + 1] for x in (q, k, v))
        b = None if bias is None else bias[:, head : head + 1]
        double = (x.double() for x in (q1, k1, v1))
        truth, true_lse = reference(
            *double, scale, None if b is None else b.double(), lengths, True
        )
        plain, _ = reference(q1, k1, v1, scale, b, lengths, True)
        assert_close(out[:, :, head : head + 1], truth, plain)
        assert_close(lse[:, head : head + 1], true_lse)


def test_the_smallest_call_ends() -> None:
    code = """
import torch
from diffusion_fast.ops.cuda import attention as attention_cuda
from diffusion_fast.ops.cuda import build as extension
assert not extension.load(64)
q, k, v = (torch.randn(1, 64, 1, 64, device="cuda").bfloat16() for _ in range(3))
out, _ = attention_cuda.forward(q, k, v, 0.125, None, None, True, 3)
torch.cuda.synchronize()
assert out.isfinite().all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("keys", (1, 16, 77, 127, 128, 129, 300, 1000))
@pytest.mark.parametrize("head_dim", extension.HEAD_DIMS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_odd_sizes(dtype: torch.dtype, head_dim: int, keys: int) -> None:
    q = strided(2, 2 * keys // 3 * 2 + 1, 3, head_dim, dtype=dtype)
    k, v = (strided(2, keys, 3, head_dim, dtype=dtype) for _ in range(2))
    check(q, k, v)


@pytest.mark.parametrize("head_dim", (40, 64, 80, 160))
def test_lengths_bias_and_one_prompt_for_all(head_dim: int) -> None:
    """What lies past the shortest useful length is NaN and must not matter."""
    q = strided(3, 200, 2, head_dim)
    k, v = (strided(1, 300, 2, head_dim) for _ in range(2))
    bias = torch.randn(1, 2, 1, 300, device="cuda").bfloat16().float()
    lengths = torch.tensor([290, 129, 3], device="cuda")
    clean = k.clone(), v.clone()
    k[:, 290:] = v[:, 290:] = math.nan
    out, lse = run(q, k, v, bias, lengths)
    clean_out, clean_lse = run(q, *clean, bias, lengths)
    assert torch.equal(out, clean_out)
    assert torch.equal(lse, clean_lse)
    check(q, *clean, bias, lengths)


@pytest.mark.parametrize("queries, keys, heads, head_dim", SHAPES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_real_shapes(
    dtype: torch.dtype, queries: int, keys: int, heads: int, head_dim: int
) -> None:
    q = torch.randn(2, queries, heads, head_dim, device="cuda").to(dtype)
    k, v = (torch.randn(2, keys, heads, head_dim, device="cuda").to(dtype) for _ in range(2))
    check(q, k, v)


def test_nan_stays_in_its_row() -> None:
    q, k, v = (strided(1, 300, 2, 40) for _ in range(3))
    q[0, 5, 1] = math.nan
    out, _ = run(q, k, v)
    assert out[0, 5, 1].isnan().all()
    out[0, 5, 1] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("head_dim", (40, 64, 160))
def test_same_bits_every_time(head_dim: int) -> None:
    q, k, v = (strided(2, 2048, 8, head_dim) for _ in range(3))
    first, first_lse = run(q, k, v)
    for _ in range(200):
        out, lse = run(q, k, v)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_captured_in_a_graph() -> None:
    """The tensor maps travel as kernel parameters: a replay needs nothing from the host."""
    q, k, v = (strided(2, 300, 2, 40) for _ in range(3))
    run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = run(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, run(q, k, v)[0])
