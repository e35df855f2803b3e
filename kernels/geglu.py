"""GEGLU in one pass: y = value * gelu(gate), [..., 2C] -> [..., C], value the first half of a row.

    gelu(g)  = g Phi(g)                      Phi(g) = (1 + erf(g / sqrt 2)) / 2
    gelu'(g) = Phi(g) + g phi(g)             phi(g) = exp(-g^2 / 2) / sqrt(2 pi)
    dvalue   = dy gelu(gate)                 dgate  = dy value gelu'(gate)

Layout: rows, each contiguous, a row's stride free. float32 arithmetic (float64 for float64).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .layer_norm import _rows

BLOCK = 1024


@triton.jit
def _phi(gate):
    return 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))


@triton.jit
def _halves(x_ptr, stride, columns, blocks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """(row, column, its mask, value, gate) of a program."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < columns
    x_ptr += row * stride
    value = tl.load(x_ptr + column, mask=valid, other=0.0).to(DTYPE)
    gate = tl.load(x_ptr + columns + column, mask=valid, other=0.0).to(DTYPE)
    return row, column, valid, value, gate


@triton.jit
def _geglu(y_ptr, x_ptr, stride, columns, blocks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    row, column, valid, value, gate = _halves(x_ptr, stride, columns, blocks, DTYPE, BLOCK)
    tl.store(y_ptr + row * columns + column, value * (gate * _phi(gate)), mask=valid)


@triton.jit
def _gradient(
    dx_ptr,
    dy_ptr,
    x_ptr,
    dy_stride,
    stride,
    columns,
    blocks,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, valid, value, gate = _halves(x_ptr, stride, columns, blocks, DTYPE, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=valid, other=0.0).to(DTYPE)
    cdf = _phi(gate)
    slope = cdf + gate * (0.3989422804014327 * tl.exp(-0.5 * gate * gate))
    dx_ptr += row * 2 * columns + column
    tl.store(dx_ptr, dy * (gate * cdf), mask=valid)
    tl.store(dx_ptr + columns, dy * value * slope, mask=valid)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
    rows: int,
    columns: int,
    like: Tensor,
) -> None:
    block = min(BLOCK, launch.power_of_2(columns))
    blocks = triton.cdiv(columns, block)
    options = {"DTYPE": launch.accumulator(like.dtype), "BLOCK": block, "device": like.device}
    launch.launch(kernel, (rows * blocks,), *tensors, *strides, columns, blocks, **options)


def geglu(x: Tensor) -> Tensor:
    """[..., C], contiguous."""
    columns = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel():
        x, stride = _rows(x)
        _launch(_geglu, (y, x), (stride,), x.shape[0], columns, x)
    return y


def geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, contiguous."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dy.numel():
        (x, stride), (dy, dy_stride) = _rows(x), _rows(dy)
        _launch(_gradient, (dx, dy, x), (dy_stride, stride), x.shape[0], dy.shape[1], x)
    return dx
