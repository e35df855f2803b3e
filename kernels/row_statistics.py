"""Mean and 1 / deviation of rows: one read, two numbers written; two passes on chip.

    mean = sum(x) / C            rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)

Layout: rows [R, C], each contiguous, a row's stride free. A program takes a few whole rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .layer_norm import _load_rows, _moments, _rows, _tile


@triton.jit
def _row_statistics(
    mean_ptr,
    rstd_ptr,
    x_ptr,
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
    mean, _, rstd = _moments(x, valid, columns, eps, DTYPE)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd [...] of x [..., C], in the type that the kernel computes in."""
    dtype = launch.torch_accumulator(x.dtype)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=dtype, device=x.device) for _ in range(2))
    if not x.numel():
        return mean, rstd
    x, stride = _rows(x)
    height, block, warps = _tile(*x.shape)
    grid = (triton.cdiv(x.shape[0], height),)
    options = {"DTYPE": launch.accumulator(x.dtype), "ROWS": height, "BLOCK": block}
    options |= {"num_warps": warps, "device": x.device}
    launch.launch(_row_statistics, grid, mean, rstd, x, stride, *x.shape, eps, **options)
    return mean, rstd
