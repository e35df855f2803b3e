"""Noising and its training target in one pass.

    x_t = a[t] x_0 + s[t] eps            a = sqrt(abar), s = sqrt(1 - abar)
    v   = a[t] eps - s[t] x_0            (v-prediction's target)

Read once: x_0, and eps unless it is drawn in the kernel. Written once: x_t, and the target where it
is neither argument. The pair (x_t, v) is (x_0, eps) turned by an angle, so the gradient is the same
kernel turning back. Layout: any dense one, seen as [outer, B, inner] in memory; x_0 and eps share
it, and an argument that is not dense is copied first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, philox

BLOCK = 2048


@triton.jit(do_not_specialize=["seed", "offset"])
def _rotate(
    first_ptr,
    second_ptr,
    t_ptr,
    signal_ptr,
    sigma_ptr,
    out_ptr,
    target_ptr,
    state_ptr,
    seed: tl.int64,
    offset: tl.int64,
    inner,
    batch,
    chunks,
    channels,
    DTYPE: tl.constexpr,
    SECOND: tl.constexpr,  # "load", "zero" or "draw"
    TARGET: tl.constexpr,  # "none", "rotated" or "second"
    BACK: tl.constexpr,
    STATE_ON_DEVICE: tl.constexpr,
    LAYOUT: tl.constexpr,  # of a drawn image: "quads", "contiguous" or "channels_last"
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // chunks
    start = (program % chunks).to(tl.int64) * BLOCK
    base = image.to(tl.int64) * inner + start
    index = tl.arange(0, BLOCK)
    valid = index < inner - start

    step = tl.load(t_ptr + image % batch)
    a = tl.load(signal_ptr + step).to(DTYPE)
    s = tl.load(sigma_ptr + step).to(DTYPE)
    if BACK:
        s = -s

    first = tl.load(first_ptr + base + index, mask=valid, other=0.0).to(DTYPE)
    if SECOND == "load":
        second = tl.load(second_ptr + base + index, mask=valid, other=0.0).to(DTYPE)
    elif SECOND == "draw":
        seed, offset = philox.stream(state_ptr, seed, offset, STATE_ON_DEVICE)
        if LAYOUT == "quads":
            drawn = philox.normal4(seed, offset, base // 4 + tl.arange(0, BLOCK // 4))
        elif LAYOUT == "contiguous":
            drawn = philox.normal(seed, offset, base + index)
        else:
            # Memory holds [S, C], the stream counts [C, S].
            place = start + index
            place = (place % channels) * (inner // channels) + place // channels
            drawn = philox.normal(seed, offset, image.to(tl.int64) * inner + place)
        # Rounded as a noise tensor would be, so that x_t and the returned noise agree.
        second = drawn.to(first_ptr.dtype.element_ty).to(DTYPE)
    else:
        second = tl.zeros([BLOCK], DTYPE)  # not first * 0, which is NaN beside an infinity

    tl.store(out_ptr + base + index, a * first + s * second, mask=valid)
    if TARGET == "rotated":
        tl.store(target_ptr + base + index, a * second - s * first, mask=valid)
    elif TARGET == "second":
        tl.store(target_ptr + base + index, second, mask=valid)


def _run(
    first: Tensor,
    second: Tensor | None,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    out: Tensor,
    target: Tensor,
    kind: str,
    back: bool = False,
    state: Tensor | None = None,
    layout: str | None = "quads",
) -> None:
    outer, batch, inner = launch.dense_batch(out)
    chunks = triton.cdiv(inner, BLOCK)
    how = "draw" if state is not None else "zero" if second is None else "load"
    state_ptr, seed, offset, on_device = (
        (None, 0, 0, False) if state is None else philox.arguments(state)
    )
    launch.launch(
        _rotate,
        (outer * batch * chunks,),
        first,
        second,
        t,
        signal,
        sigma,
        out,
        target,
        state_ptr,
        seed,
        offset,
        inner,
        batch,
        chunks,
        out.shape[1] if out.dim() > 1 else 1,
        device=out.device,
        DTYPE=launch.accumulator(out.dtype),
        SECOND=how,
        TARGET=kind,
        BACK=back,
        STATE_ON_DEVICE=on_device,
        LAYOUT=layout,
        BLOCK=BLOCK,
        num_warps=8,
    )


def add_noise(
    x_0: Tensor, noise: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, velocity: bool
) -> tuple[Tensor, Tensor]:
    """x_t and v (empty unless ``velocity``)."""
    x_t = torch.empty_like(x_0)
    v = torch.empty_like(x_0) if velocity else x_0.new_empty(0)
    first, second = launch.laid_out_like(x_0, x_t), launch.laid_out_like(noise, x_t)
    kind = "rotated" if velocity else "none"
    _run(first, second, _dense(t), _dense(signal), _dense(sigma), x_t, v, kind)
    return x_t, v


def add_noise_philox(
    x_0: Tensor, state: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, target: str
) -> tuple[Tensor, Tensor]:
    """x_t and the target, of noise drawn in the kernel; empty for the target ``"sample"``."""
    x_t = torch.empty_like(x_0)
    layout = _stream_layout(x_t)
    out = x_t if layout else torch.empty_like(x_0, memory_format=torch.contiguous_format)
    kind = {"epsilon": "second", "v_prediction": "rotated", "sample": "none"}[target]
    extra = torch.empty_like(out) if kind != "none" else x_0.new_empty(0)
    first = launch.laid_out_like(x_0, out)
    tables = _dense(t), _dense(signal), _dense(sigma)
    layout = layout or _stream_layout(out)
    _run(first, None, *tables, out, extra, kind, state=state, layout=layout)
    if out is x_t:
        return x_t, extra
    return x_t.copy_(out), extra if kind == "none" else torch.empty_like(x_t).copy_(extra)


def add_noise_backward(
    grad_x_t: Tensor, grad_v: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, velocity: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x_0 and the noise: the same rotation, backwards."""
    grad_x_0, grad_noise = torch.empty_like(grad_x_t), torch.empty_like(grad_x_t)
    first = launch.laid_out_like(grad_x_t, grad_x_0)
    second = launch.laid_out_like(grad_v, grad_x_0) if velocity else None
    tables = _dense(t), _dense(signal), _dense(sigma)
    _run(first, second, *tables, grad_x_0, grad_noise, "rotated", back=True)
    return grad_x_0, grad_noise


def _dense(value: Tensor) -> Tensor:
    return value.contiguous()  # [B] and [T]: itself, unless someone passes a slice


def _stream_layout(out: Tensor) -> str | None:
    """How a dense tensor's memory runs against the stream's row-major order; None: neither way."""
    if out.is_contiguous():
        return "quads" if out[0:1].numel() % 4 == 0 else "contiguous"
    if out.transpose(1, -1).is_contiguous() if out.dim() == 3 else _is_channels_last(out):
        return "channels_last"
    return None


def _is_channels_last(out: Tensor) -> bool:
    return (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)) or (
        out.dim() == 5 and out.is_contiguous(memory_format=torch.channels_last_3d)
    )
