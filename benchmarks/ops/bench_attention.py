"""Attention: our kernels against every backend of torch's SDPA, flash-attn and xformers.

    python -m pytest benchmarks/ops/bench_attention.py --benchmark-enable --benchmark-only

On a GPU every shape of Stable Diffusion 1.5 and XL runs on every backend that takes it, forward and
forward + backward, all backends of a shape in turns (see harness.py: device time over graph
replays, inputs in the L2 cache and flushed from it). Without a GPU only small shapes run, on the
CPU reference, and say so; what can be known without one is printed by ``python -m
benchmarks.ops.bench_attention``: tensor-core work done over needed, blocks per multiprocessor.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_fast import ops
from diffusion_fast.ops.attention import reference
from diffusion_fast.ops.cuda import attention as attention_cuda
from diffusion_fast.ops.cuda import build
from diffusion_fast.ops.dispatch import BackendError, use_backend

from ..lib.environment import GPU, environment
from ..lib.timing import percentiles
from ..tools import attention_resources as resources
from . import harness

# Dense bf16 TFLOP/s on random data: what a large matrix product reaches (measured, public figures).
LIMIT_TFLOPS = {"H200": 790.0, "H100": 750.0, "A100": 290.0}


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> float:
        """Useful multiply-adds of the forward pass, times 2: Q K^T and P V, nothing padded."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.head_dim

    def __str__(self) -> str:
        return f"{self.name}-{self.queries}x{self.keys}x{self.head_dim}"


def _model(name: str, levels: list[tuple[int, int, int]]) -> list[Shape]:
    """Self-attention and cross-attention (77, 154 and 231 keys) of (queries, heads, head dim)."""
    shapes = []
    for queries, heads, dim in levels:
        shapes.append(Shape(f"{name}-self", 2, queries, queries, heads, dim))
        shapes += [Shape(f"{name}-cross", 2, queries, n, heads, dim) for n in (77, 154, 231)]
    return shapes


SHAPES = _model("sd15", [(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)])
SHAPES += _model("sdxl", [(4096, 10, 64), (1024, 20, 64)])
CPU_SHAPES = [Shape("small-self", 1, 256, 256, 2, 40), Shape("small-cross", 1, 256, 77, 2, 40)]


# ---- backends: functions of q, k, v [B, S, H, D]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with use_backend("cuda"):
        return ops.attention(q, k, v)


def _hopper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Forward only."""
    refused = attention_cuda.machine() or attention_cuda.supports(q, k, v, 1.0, None)
    refused = refused or build.load(q.shape[-1])
    why = "; ".join(refused) or attention_cuda.hopper_fails(q.device)
    if why:
        raise BackendError(why)
    if torch.is_grad_enabled() and q.requires_grad:
        raise NotImplementedError("a forward kernel: the backward pass is that of 'ours'")
    scale = q.shape[-1] ** -0.5
    return attention_cuda.forward(q, k, v, scale, None, None, False, kernel=3)[0]


def _sdpa(backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference(q, k, v, q.shape[-1] ** -0.5, None, None, False)[0]


def _backends() -> dict[str, Attention]:
    if not GPU:
        return {"cpu-reference": _reference}
    found: dict[str, Attention] = {
        "ours": _ours,
        "ours-hopper": _hopper,
        "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa-math": _sdpa(SDPBackend.MATH),
    }
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        found["flash-attn"] = flash_attn_func
    if importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        found["xformers"] = memory_efficient_attention
    return found


BACKENDS = _backends()


def _inputs(shape: Shape, device: str, backward: bool) -> tuple[Tensor, ...]:
    def random(rows: int) -> Tensor:
        size = (shape.batch, rows, shape.heads, shape.head_dim)
        x = torch.randn(size, device=device).bfloat16()
        return x.requires_grad_(backward)

    return random(shape.queries), random(shape.keys), random(shape.keys)


def _step(attention: Attention, inputs: tuple[Tensor, ...], backward: bool) -> Tensor:
    out = attention(*inputs)
    if backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return out


def _error(attention: Attention, inputs: tuple[Tensor, ...]) -> float:
    """Max-norm against float64 over max|truth|, on the first image and head."""
    q, k, v = (x[:1, :, :1].detach() for x in inputs)
    truth = _reference(q.double(), k.double(), v.double())
    out = attention(*(x.detach() for x in inputs))[:1, :, :1]
    return ((out.double() - truth).abs().max() / truth.abs().max()).item()


@functools.lru_cache(maxsize=1)
def _measured(shape: Shape, backward: bool) -> dict[str, dict[str, Any]]:
    """Every backend on one shape, in turns: rows by name, with ``refused`` where it can't run."""
    inputs = _inputs(shape, "cuda", backward)
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, attention in BACKENDS.items():
        call = functools.partial(_step, attention, inputs, backward)
        try:
            rows[name] = {"max_error": _error(attention, inputs)}
            call()
        except (BackendError, RuntimeError, NotImplementedError) as refused:
            if name == "ours":
                raise
            rows[name] = {"refused": str(refused).splitlines()[0]}
        else:
            calls[name] = call
    limit = _limit_tflops()
    for name, times in harness.device_times(calls).items():
        row = rows[name]
        row |= {f"{kind}_us": percentiles(samples) for kind, samples in times.items()}
        row["useful_tflops"] = _flops(shape, backward) / row["cold_us"]["p50"] / 1e6
        row["share_of_limit"] = row["useful_tflops"] / limit if limit else None
    return rows


def _flops(shape: Shape, backward: bool) -> float:
    """The backward pass has 5 products to the forward's 2."""
    return shape.flops * (3.5 if backward else 1)


def _limit_tflops() -> float | None:
    name = torch.cuda.get_device_name()
    return next((value for key, value in LIMIT_TFLOPS.items() if key in name), None)


@pytest.mark.parametrize("name", BACKENDS)  # varies fastest: all of a shape are measured together
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "forward+backward"))
@pytest.mark.parametrize("shape", SHAPES if GPU else CPU_SHAPES, ids=str)
def test_attention(benchmark: Any, shape: Shape, name: str, backward: bool) -> None:
    benchmark.group = f"{shape} {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info.update(environment())
    info: dict[str, Any] = {"case": str(shape), "variant": name, "dtype": "bfloat16"}
    info["flops"] = _flops(shape, backward)
    if GPU:
        info |= _measured(shape, backward)[name]
    else:
        info["mode"] = "CPU reference on a small shape: says nothing about a GPU"
    if "refused" in info:
        pytest.skip(f"{name} does not take this: {info['refused']}")
    inputs = _inputs(shape, harness.DEVICE, backward)
    info.setdefault("max_error", _error(BACKENDS[name], inputs))
    benchmark.extra_info.update(info)

    def call() -> None:
        _step(BACKENDS[name], inputs, backward)
        if GPU:
            torch.cuda.synchronize()

    benchmark(call)


def test_table_of_resources(capsys: pytest.CaptureFixture[str]) -> None:
    """The table can be printed from what is recorded, for every shape and architecture."""
    print_resources()
    printed = capsys.readouterr().out
    assert all(str(shape) in printed for shape in SHAPES)


def print_resources() -> None:
    """Per shape and architecture: kernel that can run, work done over needed, blocks per SM."""
    rows = [k for k in resources.read_table() if k.type == "bf16"]
    heads = ("shape", "sm", "kernel", "work done/needed", "registers", "shared", "blocks/SM")
    print("{:28} {:>4} {:>10} {:>17} {:>9} {:>7} {:>9}".format(*heads))
    for shape in SHAPES:
        for k in rows:
            short = k.kernel == "short" and shape.keys <= k.keys and shape.keys > _smaller(k.keys)
            if k.head_dim != shape.head_dim or not (short or k.kernel == "tiled"):
                continue
            shared = k.shared_bytes
            if short:
                shared = resources.short_shared_bytes(shape.head_dim, shape.keys)
            blocks = resources.blocks_per_multiprocessor(k.architecture, k.registers, shared)
            work = resources.tensor_core_work(shape.head_dim, shape.queries, shape.keys, short)
            row = (k.architecture, f"{k.kernel}{k.keys or ''}", work, k.registers, shared)
            print("{:28} {:>4} {:>10} {:17.3f} {:9} {:7}".format(str(shape), *row), end="")
            print(f" {blocks or 'too big':>9}")


def _smaller(keys: int) -> int:
    """The most keys of the next smaller short-key kernel."""
    return {80: 0, 160: 80, 256: 160}[keys]


if __name__ == "__main__":
    print_resources()
