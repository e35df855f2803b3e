"""Attention on the CUDA kernels of csrc/: what they can run, and calling them.

Both functions allocate their outputs (and, backward, their workspace) with torch and launch on the
current stream, so they can be captured in a CUDA graph once the library is loaded. Every sum has
one order: results are the same bit for bit, call after call.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend
from . import build
from .build import HEAD_DIMS, OLDEST_CAPABILITY

_ALIGNMENT = 16  # bytes; the kernels read rows in pieces of this size
_SCALES = (1e-30, 1e30)  # positive, and its inverse is a float32 too
_MOST = 2**30  # rows: an int in the kernels, with room to round up


@cache
def machine() -> list[str]:
    """Why this machine can't run the kernels, and what to install; empty if it can."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return ["torch is built without CUDA; install a CUDA build of torch"]
        return ["no CUDA device; check the driver with nvidia-smi"]
    if not build.local_capabilities():
        return gpu(None)
    tools = None if build.prebuilt() else build.toolchain()
    return [tools] if isinstance(tools, str) else []


@cache
def gpu(device: torch.device | None) -> list[str]:
    """Why this GPU (None: the current one) can't run the kernels; of two in a machine one may."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_CAPABILITY:
        return [f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer"]
    return []


def supports(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, *_: Any
) -> list[str]:
    """Why the kernels can't run a forward call; empty if they can."""
    why = inputs_fit(q, k, v, scale, bias)
    if not why and q.device.type != "cuda":
        why = [f"the tensors are on {q.device}, not on a CUDA device"]
    return why or gpu(q.device)


def inputs_fit(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> list[str]:
    """Why the kernels can't take such tensors, wherever they are."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return [f"dtype {q.dtype}; the kernels take float16 and bfloat16"]
    if q.shape[-1] not in HEAD_DIMS:
        return [f"head dim {q.shape[-1]}; the kernels take {', '.join(map(str, HEAD_DIMS))}"]
    if not _SCALES[0] <= scale <= _SCALES[1]:
        return [f"scale {scale}; the kernels take {_SCALES[0]} to {_SCALES[1]}"]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        why = _rows_fit(tensor)
        if why:
            return [f"{name} {why}"]
    if bias is not None and bias.dim() > 1 and bias.shape[-2] != 1:
        return [f"bias {list(bias.shape)} differs by query; the kernels add one number per key"]
    if max(q.shape[0] * q.shape[2] * q.shape[1], k.shape[1]) > _MOST:
        return [f"more than {_MOST} rows of q or keys"]
    return [] if q.numel() else ["q is empty"]


def _rows_fit(tensor: Tensor) -> str:
    """What is wrong with the strides of a tensor; empty if nothing is."""
    if tensor.stride(-1) != 1:
        return "is not contiguous in its last dim"
    elements = _ALIGNMENT // tensor.element_size()
    strides = [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1][:-1]
    if any(s % elements for s in strides):
        return f"has rows that do not begin at multiples of {_ALIGNMENT} bytes"
    return ""


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it doesn't begin at a multiple of 16 bytes or its rows don't fit.

    Not contiguous(): that keeps a dense tensor wherever it begins.
    """
    if tensor.data_ptr() % _ALIGNMENT or _rows_fit(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _key_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """float32 [B, H, Sk], broadcast dims as strides of 0."""
    if bias is None:
        return None
    padded = bias.float().reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    full = padded.expand(-1, -1, -1, k.shape[1]) if k.shape[1] != 1 else padded
    if full.stride(-1) != 1:
        full = full.contiguous()
    return full.expand(q.shape[0], q.shape[2], 1, k.shape[1])[:, :, 0]


def _op(name: str, head_dim: int) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(
        torch.ops.diffusion_fast_cuda, f"attention_{name}_{head_dim}"
    ).default
    return overload


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D] and lse [B, H, Sq] float32 (empty unless ``save_lse``).

    Args:
        kernel: 0 chooses by shape and device; 1 asks for the short-key kernel, 2 for the tiled one,
            3 for the Hopper one, which takes a measurement to be chosen (:mod:`.contest`).

    Raises:
        RuntimeError: the kernel asked for can't run this call or not on this GPU; says why.
    """
    batch, queries, heads, head_dim = q.shape
    q, k, v = map(_aligned, (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, queries) if save_lse else (0,), dtype=torch.float32)
    lengths = None if key_lengths is None else key_lengths.to(torch.int32).contiguous()
    shared = (x.expand(batch, -1, -1, -1) for x in (k, v))
    _op("forward", head_dim)(
        q, *shared, _key_bias(bias, q, k), lengths, out, lse, scale, kernel, _stream(q)
    )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty without one)."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    grad, q, k, v, out = map(_aligned, (grad, q, k, v, out))
    splits: int = _op("splits", head_dim)(batch * heads, queries, keys, q.device.index or 0)
    dense = torch.contiguous_format
    dq = torch.empty_like(q, memory_format=dense)
    delta = q.new_empty((batch, heads, queries), dtype=torch.float32)
    shared = batch > 1 and k.shape[0] == 1  # one prompt for all: its gradients sum over the batch
    dk = dv = dk_parts = dv_parts = dbias_parts = None
    if splits > 1 or shared:
        parts = (splits, batch, keys, heads, head_dim)
        dk_parts, dv_parts = (q.new_empty(parts, dtype=torch.float32) for _ in range(2))
    else:
        dk, dv = (torch.empty_like(x, memory_format=dense) for x in (k, v))
    if bias is not None:
        dbias_parts = q.new_empty((splits, batch, heads, keys), dtype=torch.float32)
    lengths = None if key_lengths is None else key_lengths.to(torch.int32).contiguous()
    inputs = (grad, q, k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), out, lse)
    outputs = (delta, dq, dk, dv, dk_parts, dv_parts, dbias_parts)
    _op("backward", head_dim)(
        *inputs, _key_bias(bias, q, k), lengths, *outputs, scale, splits, _stream(q)
    )
    if dk_parts is not None and dv_parts is not None:
        over = (0, 1) if shared else (0,)
        dk, dv = (x.sum(over).to(q.dtype).reshape(k.shape) for x in (dk_parts, dv_parts))
    assert dk is not None
    assert dv is not None
    if bias is None or dbias_parts is None:
        return dq, dk, dv, q.new_empty(0)
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    dbias = dbias_parts.sum(0)[:, :, None].sum_to_size(padded)
    return dq, dk, dv, dbias.reshape(bias.shape).to(bias.dtype).contiguous()


SMALLEST_HOPPER_CALL = """
import torch
from diffusion_fast.ops.cuda import attention, build

assert not build.load(64)
x = torch.randn(1, 64, 1, 64, device="cuda:{index}").bfloat16()
attention.forward(x, x, x, 0.125, None, None, False, kernel=3)
torch.cuda.synchronize()
"""


@cache
def hopper_fails(device: torch.device) -> str | None:
    """Why the Hopper kernel must not be called on this GPU; None where it works.

    It waits for barriers, and a kernel that hangs can't be stopped in its own process: so another
    one makes the smallest call, once for a GPU and these sources; the answer is kept on disk.
    """
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "it takes a GPU of compute capability 9.0"
    from ...kernels import measurements, tuning  # imports triton

    file, key = tuning.cache_file(device), f"hopper attention {build.version()}"
    known = measurements.results(file).get(key)
    if known is None:
        known = _smallest_call_fails(device.index or 0)
        measurements.remember(file, key, known)
    return known or None


def _smallest_call_fails(index: int) -> str:
    """Why the smallest call fails in a process of its own; empty if it doesn't."""
    command = [sys.executable, "-c", SMALLEST_HOPPER_CALL.format(index=index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "the smallest call does not end"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` on the Hopper kernel.

    Raises:
        RuntimeError: it can't run, on this GPU or for this call; says why.
    """
    why = hopper_fails(q.device)
    if why is not None:
        raise RuntimeError(f"the Hopper kernel: {why}")
    return forward(q, k, v, scale, bias, key_lengths, save_lse, kernel=3)


def ready(q: Tensor, *_: Any) -> list[str]:
    """Builds the kernels of a head dim at its first call."""
    return build.load(q.shape[-1])


def foresee(q: Tensor, *_: Any) -> list[str]:
    return build.failures.get(q.shape[-1], [])


def _of_forward(function: Any) -> Any:
    """The same about a backward call, whose arguments have others between them."""
    return lambda grad, q, k, v, out, lse, scale, bias, lengths: function(q, k, v, scale, bias)


BACKWARD = Backend("cuda", lambda: backward, machine, *map(_of_forward, (supports, ready, foresee)))
