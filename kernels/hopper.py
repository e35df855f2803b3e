"""The product of matmul.py for Hopper: operands by TMA, and blocks that stay.

Descriptors. x is [image, row, column, channel], a linear layer one image of one row. A step loads a
box of pixels and K channels; the place in the window shifts the box, and the hardware gives zeros
outside of the image. w is [place in the window, column of the result, channel]; of a gated layer
[half, column, channel], so that a box has both halves of the same columns. So neither addresses nor
masks are computed per element, and both operands of wgmma lie in shared memory.

The product is w x^T: a box of pixels of several rows can only be the second operand there. Of a
gated layer it is x w^T, which leaves a value and its gate in one thread.

As many blocks as fit the GPU each take one tile after another in one flat loop: loads of the next
tile are on their way while the results of the last one are written.

Triton 3.6 and 3.7 specialise no warps in this loop on sm_90 (no setmaxnreg in what they compile),
so that isn't asked for.

The formula, layouts and accuracy are those of matmul.py; x and w are bfloat16 or float16, their
channels neighbours, all other strides and addresses multiples of 16 bytes.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .geglu import _phi
from .product import (
    GROUP,
    Product,
    add_parts,
    affine,
    after,
    cuts,
    finish,
    parts_of,
    tile_of,
)

BOX = 256  # elements of a box along a dimension, at most
BLOCKS = {4: 2, 8: 1}  # of a multiprocessor, by the warps of a block
LINE = 16  # bytes that strides and addresses are multiples of


# Numbers that decide nothing about the program: neither whether addresses are aligned nor its form.
# The sides of the result are none of them: a layer's height of 1 saves registers, or 62 spill.
@triton.jit(
    do_not_specialize=["rows", "pixels", "images", "top", "left", "parts", "per_part"],
)
def _persistent(
    y_ptr,
    y_strides,
    parts_ptr,
    x_desc,
    w_desc,
    epilogue,
    residual_ptr,
    rows,
    columns,
    pixels,
    channels,
    images,
    out_height,
    out_width,
    top,
    left,
    parts,
    per_part,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    GEGLU: tl.constexpr,
    WIDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH
    shape, out_size = (rows, columns, pixels), (out_height, out_width)
    across = tl.cdiv(out_width, WIDTH)
    down = tl.cdiv(out_height, HEIGHT)
    tiles_m, tiles_n = across * down * tl.cdiv(images, IMAGES), tl.cdiv(columns, N)
    blocks = tl.cdiv(channels, K)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n * parts, tl.num_programs(0), flatten=True
    ):
        tile_m, tile_n, part = tile_of(tile, tiles_m, tiles_n, GROUP)
        j = tile_m % across * WIDTH
        i = tile_m // across % down * HEIGHT
        image = tile_m // across // down * IMAGES
        n = tile_n * N
        acc = tl.zeros([M, 2 * N], DTYPE) if GEGLU else tl.zeros([N, M], DTYPE)
        # As many steps for every tile, or there is no flat loop. Those behind the last one have
        # channels that are not there, zeros.
        for step in range(per_part):
            step += part * per_part
            tap = tl.minimum(step // blocks, TAPS - 1)
            channel = (step - tap * blocks) * K
            x = x_desc.load([image, i - top + tap // KW, j - left + tap % KW, channel])
            x = x.reshape(M, K)
            if GEGLU:
                w = w_desc.load([0, n, channel]).reshape(2 * N, K)
            else:
                w = w_desc.load([tap, n, channel]).reshape(N, K)
            if WIDEN:
                x, w = x.to(acc.dtype), w.to(acc.dtype)
            if GEGLU:
                acc = tl.dot(x, w.T, acc)
            else:
                acc = tl.dot(w, x.T, acc)

        # In two halves, which takes half the registers: of columns, or of pixels.
        place = (image, i, j, images, out_size)
        if GEGLU:
            row = _rows(place, 0, rows, HEIGHT, WIDTH, M, WIDE)
            acc, gate = _halves(acc, M, N)
            value0, value1 = _halves(acc, M, N // 2)
            gate0, gate1 = _halves(gate, M, N // 2)
            for half in tl.static_range(2):
                column = n + half * (N // 2) + tl.arange(0, N // 2)
                value = value0 if half == 0 else value1
                gate = gate0 if half == 0 else gate1
                value = affine(value, epilogue, row, column, 0, shape, DTYPE)
                gate = affine(gate, epilogue, row, column, columns, shape, DTYPE)
                value = value * (gate * _phi(gate))
                finish(value, y_ptr, residual_ptr, y_strides, row, column, shape, DTYPE)
        else:
            column = n + tl.arange(0, N)
            value0, value1 = _halves(acc, N, M // 2)
            for half in tl.static_range(2):
                value = (value0 if half == 0 else value1).T
                row = _rows(place, half * (M // 2), rows, HEIGHT, WIDTH, M // 2, WIDE)
                if parts_ptr is not None:
                    mask = (row < rows)[:, None] & (column < columns)[None, :]
                    at = ((row + part * rows) * columns)[:, None] + column[None, :]
                    tl.store(parts_ptr + at, value, mask=mask)
                else:
                    value = affine(value, epilogue, row, column, 0, shape, DTYPE)
                    finish(value, y_ptr, residual_ptr, y_strides, row, column, shape, DTYPE)


@triton.jit
def _halves(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile [ROWS, 2 COLUMNS]."""
    return value.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()


@triton.jit
def _rows(
    place,
    first,
    rows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The result's rows of pixels [first, first + M) of a box; ``rows`` where there is none."""
    image, i, j, images, out_size = place
    pixel = first + tl.arange(0, M)
    image += pixel // (HEIGHT * WIDTH)
    i += pixel // WIDTH % HEIGHT
    j += pixel % WIDTH
    if WIDE:
        image = image.to(tl.int64)
    exists = (image < images) & (i < out_size[0]) & (j < out_size[1])
    return tl.where(exists, (image * out_size[0] + i) * out_size[1] + j, rows)


class Persistent(NamedTuple):
    """A tile of m pixels and n columns, what computes it, and how many parts the sum has."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1


LARGE = Persistent(256, 128, 64, 8, 3)
FLAT = Persistent(128, 256, 64, 8, 3)
MIDDLE = Persistent(128, 128, 64, 8, 4)
SMALL = Persistent(128, 64, 64, 4, 4)
GATED = (Persistent(128, 128, 64, 8, 3), Persistent(128, 64, 64, 8, 4))  # two tiles of w


Operand = tuple[Tensor, tuple[int, ...], tuple[int, ...]]  # tensor, shape, strides


def fits(p: Product) -> bool:
    """Whether descriptors can be made of a product's operands, on a GPU that this is for."""
    item = p.x.element_size()
    return (
        p.x.dtype in (torch.bfloat16, torch.float16)
        and launch.capability(p.x.device)[0] == 9
        and p.x2 is None
        and p.stride == 1
        and p.x_strides[1] == p.w_strides[1] == 1
        and p.channels[0] * item % LINE == 0
        and all(_aligned(t, item) for t in _operands(p))
    )


def _operands(p: Product) -> tuple[Operand, Operand]:
    """(tensor, shape, strides) of the descriptors of x and w."""
    images = p.shape[0] // p.shape[2]
    image, channel, row, column = p.x_strides
    x = (p.x, (images, *p.size, p.channels[0]), (image, row, column, channel))
    of_column, channel, row, column = p.w_strides
    if p.geglu:
        return x, (p.w, (2, p.shape[1], p.channels[0]), (p.shape[1] * of_column, of_column, 1))
    height, width = p.window
    # The places of the window lie one behind the other, or there is no descriptor.
    across = column if width > 1 else row
    if height > 1 and width > 1 and row != width * column:
        across = 0
    return x, (p.w, (height * width, p.shape[1], p.channels[0]), (across, of_column, channel))


def _aligned(operand: Operand, item: int) -> bool:
    """Whether the address and all strides that are used are multiples of a line, and not 0."""
    tensor, shape, strides = operand
    return tensor.data_ptr() % LINE == 0 and all(
        stride * item % LINE == 0 and stride > 0
        for size, stride in zip(shape[:-1], strides, strict=False)
        if size > 1
    )


def _descriptor(operand: Operand, box: tuple[int, ...]) -> TensorDescriptor:
    tensor, shape, strides = operand
    made, dense = [1], shape[-1]
    for size, stride in zip(shape[-2::-1], strides[-2::-1], strict=True):
        made.append(stride if size > 1 else dense)  # of one element the stride says nothing
        dense = made[-1] * size
    return TensorDescriptor(tensor, list(shape), made[::-1], list(box))


def box(p: Product, m: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a tile of m pixels: those that leave the fewest tiles."""
    sides = [1 << e for e in range(BOX.bit_length()) if 1 << e <= m]
    found = [(m // (h * w), h, w) for w in sides for h in sides if m % (h * w) == 0]
    return min(found, key=lambda one: (_tiles(p, one), -one[2], -one[1]))


def _tiles(p: Product, box: tuple[int, int, int]) -> int:
    sizes = p.shape[0] // p.shape[2], p.shape[2] // p.out_width, p.out_width
    return math.prod(triton.cdiv(n, side) for n, side in zip(sizes, box, strict=True))


def configs(p: Product) -> list[Persistent]:
    """Candidates: tiles that are no larger than the result, whole and in parts of the sum."""
    rows, columns, _ = p.shape
    found = []
    for config in GATED if p.geglu else (LARGE, FLAT, MIDDLE, SMALL):
        if (config.m > 128 and rows <= 128) or (config.n > 64 and columns <= config.n // 2):
            continue
        found.append(config)
        if not p.geglu:
            tiles = _tiles(p, box(p, config.m)) * triton.cdiv(columns, config.n)
            found += [config._replace(parts=n) for n in cuts(p, tiles, config.k)]
    return found


def launch_product(p: Product, config: Persistent) -> None:
    """Launch the product under a config."""
    sides = box(p, config.m)
    per_part, partial = parts_of(p, config)
    parts = 1 if partial is None else len(partial)
    tiles = _tiles(p, sides) * triton.cdiv(p.shape[1], config.n) * parts
    x, w = _operands(p)
    meta = {
        "DTYPE": launch.accumulator(p.x.dtype),
        "WIDE": launch.wide(p.y, partial),
        "device": p.x.device,
    }
    launch.launch(
        _persistent,
        (min(tiles, launch.multiprocessors(p.x.device) * BLOCKS[config.warps]),),
        p.y,
        p.y_strides,
        partial,
        _descriptor(x, (*sides, config.k)),
        _descriptor(w, (2 if p.geglu else 1, config.n, config.k)),
        *after(p, partial),
        *p.shape,
        p.channels[0],
        p.shape[0] // p.shape[2],
        p.shape[2] // p.out_width,
        p.out_width,
        *p.pads,
        parts,
        per_part,
        KW=p.window[1],
        TAPS=p.window[0] * p.window[1],
        GEGLU=p.geglu,
        WIDEN=launch.INTERPRETED,  # whose products of bfloat16 are those of its bit patterns
        GROUP=GROUP,
        IMAGES=sides[0],
        HEIGHT=sides[1],
        WIDTH=sides[2],
        N=config.n,
        K=config.k,
        num_warps=config.warps,
        num_stages=config.stages,
        **meta,
    )
    if partial is not None:
        add_parts(p, partial, **meta)
