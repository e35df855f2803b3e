"""The weighted mean squared error, in two stages that always add in the same order.

    loss = sum_b w[b] sum_i (p - t)^2 / N

First each program squares and adds a piece of one image (with its weight left out); then one
program adds the pieces. float32 sums (float64 for float64). Layout: any dense one, shared by both.

Backward, with e = grad / N:  dp = 2 e w[b] (p - t),  dt = -dp,  dw[b] = e sum_i (p - t)^2, the
pieces being made again on the way.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK = 4096
PIECES = 1024  # added up at a time


@triton.jit
def _difference(p_ptr, t_ptr, inner, chunks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """(block of memory, where, mask, p - t) of a program."""
    image = tl.program_id(0) // chunks
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    valid = index < inner - start
    place = image.to(tl.int64) * inner + start + index
    p = tl.load(p_ptr + place, mask=valid, other=0.0).to(DTYPE)
    t = tl.load(t_ptr + place, mask=valid, other=0.0).to(DTYPE)
    return image, place, valid, p - t


@triton.jit
def _pieces(pieces_ptr, p_ptr, t_ptr, inner, chunks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    _, _, _, d = _difference(p_ptr, t_ptr, inner, chunks, DTYPE, BLOCK)
    tl.store(pieces_ptr + tl.program_id(0), tl.sum(d * d, 0))


@triton.jit
def _total(
    loss_ptr,
    pieces_ptr,
    weight_ptr,
    count: tl.float64,
    pieces,
    batch,
    chunks,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], DTYPE)
    for start in range(0, pieces, BLOCK):
        i = start + tl.arange(0, BLOCK)
        piece = tl.load(pieces_ptr + i, mask=i < pieces, other=0.0)
        if weight_ptr is not None:
            image = i // chunks % batch
            piece *= tl.load(weight_ptr + image, mask=i < pieces, other=0.0).to(DTYPE)
        total += piece
    tl.store(loss_ptr, tl.sum(total, 0) / tl.full((), count, DTYPE))


@triton.jit
def _gradient(
    dp_ptr,
    dt_ptr,
    pieces_ptr,
    grad_ptr,
    p_ptr,
    t_ptr,
    weight_ptr,
    count: tl.float64,
    inner,
    batch,
    chunks,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, place, valid, d = _difference(p_ptr, t_ptr, inner, chunks, DTYPE, BLOCK)
    factor = 2.0 * tl.load(grad_ptr).to(DTYPE) / tl.full((), count, DTYPE)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + image % batch).to(DTYPE)
        tl.store(pieces_ptr + tl.program_id(0), tl.sum(d * d, 0))
    tl.store(dp_ptr + place, factor * d, mask=valid)
    tl.store(dt_ptr + place, -factor * d, mask=valid)


@triton.jit
def _weight_gradient(
    dweight_ptr,
    pieces_ptr,
    grad_ptr,
    count: tl.float64,
    outer,
    batch,
    chunks,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One image per program: the sum of its pieces [outer, B, chunks]."""
    image = tl.program_id(0)
    total = tl.zeros([BLOCK], DTYPE)
    for start in range(0, outer * chunks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (i // chunks * batch + image) * chunks + i % chunks
        total += tl.load(pieces_ptr + place, mask=i < outer * chunks, other=0.0)
    factor = tl.load(grad_ptr).to(DTYPE) / tl.full((), count, DTYPE)
    tl.store(dweight_ptr + image, factor * tl.sum(total, 0))


def _laid_out(
    prediction: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """Both in one dense layout, and its (outer, B, inner, chunks)."""
    like = torch.empty_like(prediction)
    prediction = launch.laid_out_like(prediction, like)
    outer, batch, inner = launch.dense_batch(like)
    sizes = outer, batch, inner, triton.cdiv(inner, BLOCK)
    return prediction, launch.laid_out_like(target, like), sizes


def _options(like: Tensor) -> dict[str, Any]:
    return {"DTYPE": launch.accumulator(like.dtype), "device": like.device}


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """A scalar, at least float32."""
    p, t, (outer, batch, inner, chunks) = _laid_out(prediction, target)
    options = _options(p)
    accumulate = launch.torch_accumulator(p.dtype)
    count = outer * batch * chunks
    pieces = torch.empty(count, dtype=accumulate, device=p.device)
    loss = torch.empty((), dtype=accumulate, device=p.device)
    launch.launch(_pieces, (count,), pieces, p, t, inner, chunks, BLOCK=BLOCK, **options)
    weight = None if weight is None else weight.contiguous()
    sizes = float(p.numel()), count, batch, chunks
    launch.launch(_total, (1,), loss, pieces, weight, *sizes, BLOCK=PIECES, **options)
    return loss


def weighted_mse_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prediction, target and weight (empty without a weight)."""
    p, t, (outer, batch, inner, chunks) = _laid_out(prediction, target)
    options = _options(p)
    dp, dt = torch.empty_like(p), torch.empty_like(p)
    count = outer * batch * chunks
    dweight, pieces = prediction.new_empty(0), None
    if weight is not None:
        dweight, weight = torch.empty_like(weight), weight.contiguous()
        pieces = torch.empty(count, dtype=launch.torch_accumulator(p.dtype), device=p.device)
    total = float(p.numel())
    tensors = dp, dt, pieces, grad, p, t, weight
    sizes = total, inner, batch, chunks
    launch.launch(_gradient, (count,), *tensors, *sizes, BLOCK=BLOCK, **options)
    if weight is not None:
        sums = dweight, pieces, grad
        sizes = total, outer, batch, chunks
        launch.launch(_weight_gradient, (batch,), *sums, *sizes, BLOCK=PIECES, **options)
    return dp, dt, dweight
