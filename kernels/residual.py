"""Bias, residual and scale in one pass: y = (x + bias[c] + residual) * scale.

Layout: dense, seen in memory as [outer, C, inner], so that [..., C], NCHW and channels_last are one
kernel; x and residual share it. One read of each, one write.

Backward: dx = scale dy, which is the gradient of the residual too; dbias = scale sum dy, in two
stages that add in the same order every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK = 2048
PARTS = 64  # partial sums of dbias, at most


@triton.jit
def _residual(
    y_ptr,
    x_ptr,
    bias_ptr,
    residual_ptr,
    scale: tl.float64,
    count,
    channels,
    inner,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0)
    if WIDE:  # only then, because the division below is slow in 64 bits
        start = start.to(tl.int64)
    start = start * BLOCK
    index = tl.arange(0, BLOCK)
    valid = index < count - start
    y = tl.load(x_ptr + start + index, mask=valid, other=0.0).to(DTYPE)
    if bias_ptr is not None:
        channel = (start + index) // inner % channels
        y += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(DTYPE)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + start + index, mask=valid, other=0.0).to(DTYPE)
    tl.store(y_ptr + start + index, y * tl.full((), scale, DTYPE), mask=valid)


@triton.jit
def _sums(
    sums_ptr,
    dy_ptr,
    rows,
    channels,
    inner,
    per_part,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Parts of sum dy per channel, [parts, C]; a row is a pair (outer, inner)."""
    blocks = tl.cdiv(channels, COLUMNS)
    part = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    total = tl.zeros([COLUMNS], DTYPE)
    if WIDE:
        part, channel = part.to(tl.int64), channel.to(tl.int64)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        place = (row // inner * channels * inner + row % inner)[:, None]
        place += (channel * inner)[None, :]
        valid = (row < rows)[:, None] & inside[None, :]
        total += tl.sum(tl.load(dy_ptr + place, mask=valid, other=0.0).to(DTYPE), 0)
    tl.store(sums_ptr + part * channels + channel, total, mask=inside)


@triton.jit
def _dbias(
    dbias_ptr,
    sums_ptr,
    scale: tl.float64,
    parts,
    channels,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    valid = (part < parts)[:, None] & (channel < channels)[None, :]
    place = sums_ptr + part[:, None] * channels + channel[None, :]
    total = tl.sum(tl.load(place, mask=valid, other=0.0), 0)
    tl.store(dbias_ptr + channel, total * tl.full((), scale, DTYPE), mask=channel < channels)


def _collapsed(value: Tensor, dim: int) -> tuple[int, int]:
    """(channels, inner) of a dense tensor's memory."""
    channels = value.shape[dim]
    return channels, value.stride(dim) if channels > 1 else max(value.numel(), 1)


def residual(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, scale: float, dim: int
) -> Tensor:
    """y like x."""
    y = torch.empty_like(x)
    if y.numel():
        x = launch.laid_out_like(x, y)
        residual = None if residual is None else launch.laid_out_like(residual, y)
        bias = None if bias is None else bias.contiguous()
        sizes = x.numel(), *((1, 1) if bias is None else _collapsed(y, dim))
        options = {"DTYPE": launch.accumulator(x.dtype), "BLOCK": BLOCK, "device": x.device}
        options["WIDE"] = launch.wide(y)
        grid = (triton.cdiv(x.numel(), BLOCK),)
        launch.launch(_residual, grid, y, x, bias, residual, scale, *sizes, **options)
    return y


def residual_backward(dy: Tensor, scale: float, dim: int, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (and the residual) and of bias, empty where it has none."""
    make = torch.empty if dy.numel() else torch.zeros
    dbias = make(dy.shape[dim] if with_bias else 0, dtype=dy.dtype, device=dy.device)
    dx = residual(dy, None, None, scale, dim)
    if with_bias and dy.numel():
        dy = launch.laid_out_like(dy, dx)
        channels, inner = _collapsed(dx, dim)
        columns = min(32, launch.power_of_2(channels)) if inner == 1 else 1
        height = BLOCK // columns
        rows = dy.numel() // channels
        parts = min(PARTS, triton.cdiv(rows, height))
        per_part = triton.cdiv(triton.cdiv(rows, parts), height) * height
        parts, blocks = triton.cdiv(rows, per_part), triton.cdiv(channels, columns)
        accumulate = launch.torch_accumulator(dy.dtype)
        sums = torch.empty(parts, channels, dtype=accumulate, device=dy.device)
        options: dict[str, Any] = {"DTYPE": launch.accumulator(dy.dtype), "device": dy.device}
        sizes = rows, channels, inner, per_part
        tile: dict[str, Any] = {"ROWS": height, "COLUMNS": columns, "WIDE": launch.wide(dx)}
        launch.launch(_sums, (parts * blocks,), sums, dy, *sizes, **options, **tile)
        tile = {"PARTS": launch.power_of_2(parts), "COLUMNS": 32}
        grid = (triton.cdiv(channels, 32),)
        launch.launch(_dbias, grid, dbias, sums, scale, parts, channels, **options, **tile)
    return dx, dbias
