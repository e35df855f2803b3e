"""A product of a linear layer or a convolution as the kernels see it, and what follows the sum."""

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

GROUP = 8  # rows of tiles that are walked together, so that they share w in L2
PARTS = 16  # partial sums, at most
CUTS = (2, 3, 4, 6)  # numbers of parts that are measured for every tile
CROWD = 2.3  # blocks of a multiprocessor, at most, that parts may make


class Product(NamedTuple):
    """A call as the kernel sees it: tensors, strides and sizes."""

    x: Tensor
    x_strides: tuple[int, ...]  # image, channel, row, column
    x2: Tensor | None
    x2_strides: tuple[int, ...]
    w: Tensor
    w_strides: tuple[int, ...]  # column of the result, channel, row, column
    y: Tensor
    y_strides: tuple[int, int, int]  # image, pixel, column
    epilogue: tuple[Tensor | None, ...]  # bias, add, mean, rstd, sums
    residual: Tensor | None
    shape: tuple[int, int, int]  # rows, columns, pixels of an image
    channels: tuple[int, int]
    size: tuple[int, int]  # of the image
    out_width: int
    window: tuple[int, int]
    stride: int
    pads: tuple[int, int]  # top, left
    geglu: bool


def shape_of(p: Product) -> tuple[int, int, int]:
    """(rows, columns, pixels of an image) for a kernel: of a single image any number of pixels
    serves that is not less, so it is a multiple of 16, for which there is one program.
    """
    rows, columns, pixels = p.shape
    return rows, columns, triton.cdiv(pixels, 16) * 16 if rows == pixels else pixels


def after(
    p: Product, partial: Tensor | None = None
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """What a kernel does behind the sum, (epilogue, residual): nothing where the sum is partial, in
    one program whatever follows later.
    """
    return (p.epilogue, p.residual) if partial is None else ((None,) * 5, None)


class Cut(Protocol):
    """What a config says of the sum: channels of a step, and parts."""

    @property
    def k(self) -> int: ...

    @property
    def parts(self) -> int: ...


def steps(p: Product, k: int) -> int:
    """Iterations of the loop over the window and the channels."""
    chunks: int = sum(triton.cdiv(n, k) for n in p.channels)
    return chunks * p.window[0] * p.window[1]


def cuts(p: Product, tiles: int, k: int) -> list[int]:
    """Numbers of parts that leave a multiprocessor one to two blocks or so, which may win."""
    most = min(CROWD * launch.multiprocessors(p.x.device) / tiles, steps(p, k) / 8)
    return [n for n in CUTS if n <= most]


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a program's tile, and its part of the sum."""
    tiles = tiles_m * tiles_n
    part = program // tiles
    program = program % tiles
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % height, inside // height, part


@triton.jit
def affine(value, epilogue, row, column, offset, shape, DTYPE: tl.constexpr):
    """The folded LayerNorm, bias and the numbers per image; ``offset`` of the column in them."""
    rows, columns, pixels = shape[0], shape[1], shape[2]
    bias_ptr, add_ptr, mean_ptr, rstd_ptr, sums_ptr = epilogue
    inside = column < columns
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        sums = tl.load(sums_ptr + offset + column, mask=inside, other=0.0)
        value = (value - mean[:, None] * sums[None, :]) * rstd[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offset + column, mask=inside, other=0.0).to(DTYPE)
        value += bias[None, :]
    if add_ptr is not None:
        place = (row // pixels * columns)[:, None] + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value += tl.load(add_ptr + place, mask=mask, other=0.0).to(DTYPE)
    return value


@triton.jit
def finish(value, y_ptr, residual_ptr, y_strides, row, column, shape, DTYPE: tl.constexpr):
    """Add the residual, which lies as the result does, and store."""
    rows, columns, pixels = shape[0], shape[1], shape[2]
    place = row // pixels * y_strides[0] + row % pixels * y_strides[1]
    place = place[:, None] + (column * y_strides[2])[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if residual_ptr is not None:
        value += tl.load(residual_ptr + place, mask=mask, other=0.0).to(DTYPE)
    tl.store(y_ptr + place, value, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _reduce(
    y_ptr,
    y_strides,
    parts_ptr,
    epilogue,
    residual_ptr,
    shape,
    parts,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    rows, columns = shape[0], shape[1]
    tiles_n = tl.cdiv(columns, N)
    row = tl.program_id(0) // tiles_n * M + tl.arange(0, M)
    column = tl.program_id(0) % tiles_n * N + tl.arange(0, N)
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = parts_ptr + (row * columns)[:, None] + column[None, :]
    total = tl.zeros([M, N], DTYPE)
    for _ in range(parts):
        total += tl.load(place, mask=mask, other=0.0)
        place += rows * columns
    total = affine(total, epilogue, row, column, 0, shape, DTYPE)
    finish(total, y_ptr, residual_ptr, y_strides, row, column, shape, DTYPE)


def add_parts(p: Product, partial: Tensor, **meta: Any) -> None:
    """Launch the sum of partial sums [parts, rows, columns], and all that follows it."""
    parts, rows, columns = partial.shape
    m, n = 8, 128
    grid = (triton.cdiv(rows, m) * triton.cdiv(columns, n),)
    launch.launch(
        _reduce, grid, p.y, p.y_strides, partial, *after(p), shape_of(p), parts,
        M=m, N=n, **meta,
    )  # fmt: skip


def parts_of(p: Product, config: Cut) -> tuple[int, Tensor | None]:
    """(steps of each part of the sum, where partial sums go); None where the sum is whole."""
    per_part = triton.cdiv(steps(p, config.k), config.parts)
    parts = max(triton.cdiv(steps(p, config.k), max(per_part, 1)), 1)
    if parts == 1:
        return per_part, None
    accumulate = launch.torch_accumulator(p.x.dtype)
    shape = parts, *p.shape[:2]
    return per_part, torch.empty(shape, dtype=accumulate, device=p.x.device)
