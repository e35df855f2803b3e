"""LayerNorm over the last dimension: one read, one write; statistics in two passes on chip.

    u = (x - mean) * rstd            y = u * weight + bias

Layout: rows [R, C], each contiguous, a row's stride free. A program takes a few whole rows.

Backward, with k = dy * weight:

    dx = rstd (k - mean(k) - u mean(k u))       dweight = sum_r dy u       dbias = sum_r dy

The sums over rows are made in two stages, in a fixed order: a fixed number of programs walk the
rows, then their partial sums are added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

TILE = 4096  # elements that a program holds, where a row is shorter
STRIPES = 256  # partial sums of dweight and dbias, at most


@triton.jit
def _load_rows(x_ptr, row, column, stride, rows, columns, DTYPE: tl.constexpr):
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(x_ptr + place, mask=valid, other=0.0).to(DTYPE), valid


@triton.jit
def _moments(x, valid, columns, eps, DTYPE: tl.constexpr):
    """Mean of each row, the deviations from it, and rstd."""
    mean = tl.sum(x, 1) / columns
    deviation = tl.where(valid, x - mean[:, None], 0.0)
    variance = tl.sum(deviation * deviation, 1) / columns
    return mean, deviation, 1.0 / tl.sqrt(variance + tl.full((), eps, DTYPE))


@triton.jit
def _normalized(x, valid, columns, eps, DTYPE: tl.constexpr):
    """u and rstd of each row."""
    _, deviation, rstd = _moments(x, valid, columns, eps, DTYPE)
    return deviation * rstd[:, None], rstd


@triton.jit
def _layer_norm(
    y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stride,
    rows,
    columns,
    eps: tl.float64,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x, valid = _load_rows(x_ptr, row, column, stride, rows, columns, DTYPE)
    u, _ = _normalized(x, valid, columns, eps, DTYPE)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(DTYPE)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(DTYPE)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y_ptr + place, u * weight[None, :] + bias[None, :], mask=valid)


@triton.jit
def _gradient(
    dx_ptr,
    sums_ptr,
    dy_ptr,
    x_ptr,
    weight_ptr,
    dy_stride,
    stride,
    rows,
    columns,
    per_stripe,
    eps: tl.float64,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of a stripe of rows, and the stripe's part of dweight and dbias: sums [stripes, 2, C]."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(DTYPE)
    dweight = tl.zeros([BLOCK], DTYPE)
    dbias = tl.zeros([BLOCK], DTYPE)
    first = tl.program_id(0) * per_stripe
    for start in range(first, tl.minimum(first + per_stripe, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        x, valid = _load_rows(x_ptr, row, column, stride, rows, columns, DTYPE)
        dy, _ = _load_rows(dy_ptr, row, column, dy_stride, rows, columns, DTYPE)
        u, rstd = _normalized(x, valid, columns, eps, DTYPE)
        dweight += tl.sum(dy * u, 0)
        dbias += tl.sum(dy, 0)
        k = dy * weight[None, :]
        m1 = tl.sum(k, 1) / columns
        m2 = tl.sum(k * u, 1) / columns
        dx = rstd[:, None] * (k - m1[:, None] - u * m2[:, None])
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], dx, mask=valid)
    place = sums_ptr + tl.program_id(0) * 2 * columns + column
    tl.store(place, dweight, mask=inside)
    tl.store(place + columns, dbias, mask=inside)


@triton.jit
def _add_stripes(
    dweight_ptr,
    dbias_ptr,
    sums_ptr,
    stripes,
    columns,
    DTYPE: tl.constexpr,
    STRIPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stripe = tl.arange(0, STRIPES)
    valid = (stripe < stripes)[:, None] & (column < columns)[None, :]
    place = sums_ptr + stripe[:, None] * 2 * columns + column[None, :]
    dweight = tl.sum(tl.load(place, mask=valid, other=0.0), 0)
    dbias = tl.sum(tl.load(place + columns, mask=valid, other=0.0), 0)
    tl.store(dweight_ptr + column, dweight, mask=column < columns)
    tl.store(dbias_ptr + column, dbias, mask=column < columns)


def _rows(value: Tensor) -> tuple[Tensor, int]:
    """[..., C] as rows with one stride: a view where there is one, else a copy."""
    columns = value.shape[-1]
    if value.stride(-1) != 1 and columns > 1:
        value = value.contiguous()
    rows = value.reshape(-1, columns)
    return rows, rows.stride(0)


def _tile(rows: int, columns: int) -> tuple[int, int, int]:
    """Rows of a tile, its padded width, and warps."""
    block = launch.power_of_2(columns)
    height = min(max(TILE // block, 1), 16, launch.power_of_2(rows))
    return height, block, 4 if height * block <= 4096 else 8 if block <= 8192 else 16


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y like x, contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    x, stride = _rows(x)
    height, block, warps = _tile(*x.shape)
    grid = (triton.cdiv(x.shape[0], height),)
    affine = weight.contiguous(), bias.contiguous()
    options = {"DTYPE": launch.accumulator(x.dtype), "ROWS": height, "BLOCK": block}
    options |= {"num_warps": warps, "device": x.device}
    launch.launch(_layer_norm, grid, y, x, *affine, stride, *x.shape, eps, **options)
    return y


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    make = torch.empty if dx.numel() else torch.zeros
    dweight, dbias = (make(weight.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if not dx.numel():
        return dx, dweight, dbias
    (x, stride), (dy, dy_stride) = _rows(x), _rows(dy)
    height, block, warps = _tile(*x.shape)
    rows, columns = x.shape
    stripes = min(STRIPES, triton.cdiv(rows, height))
    per_stripe = triton.cdiv(triton.cdiv(rows, stripes), height) * height
    stripes = triton.cdiv(rows, per_stripe)
    dtype, device = launch.accumulator(x.dtype), x.device
    sums = torch.empty(stripes, 2, columns, dtype=launch.torch_accumulator(x.dtype), device=device)
    tensors = dx, sums, dy, x, weight.contiguous()
    sizes = dy_stride, stride, rows, columns, per_stripe
    options = {"DTYPE": dtype, "ROWS": height, "BLOCK": block, "num_warps": warps}
    launch.launch(_gradient, (stripes,), *tensors, *sizes, eps, device=device, **options)
    options = {"DTYPE": dtype, "STRIPES": launch.power_of_2(stripes), "BLOCK": 32}
    grid = (triton.cdiv(columns, 32),)
    outputs = dweight, dbias
    launch.launch(_add_stripes, grid, *outputs, sums, stripes, columns, device=device, **options)
    return dx, dweight, dbias
