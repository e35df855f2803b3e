"""One product for linear layers and convolutions (implicit GEMM), and everything after it.

    acc[m, n] = sum over the window and the channels of x[image, c, i, j] w[n, c, kh, kw]
    v = rstd[m] (acc - mean[m] s[n])             a LayerNorm folded into w; otherwise v = acc
    v = v + bias[n] + add[image, n]
    v = v * gelu(gate)                           gate: the same of the second half of w's rows
    y[m, n] = v + residual[m, n]

with m = (image, row, column) of the result, i = row * stride - top + kh and j likewise; outside the
image x is 0. A linear layer is one image of one row, with a window of one pixel. The channels may
come from two tensors, one behind the other.

Layout: any strides; x is read in whole lines where its channels are neighbours (channels_last), and
so is w. float32 accumulation (float64 for float64); float32 products in three tf32 parts, which
leaves them exact to about float32's rounding.

Where the result has too few tiles to keep a GPU busy, the sum is cut in parts: each program writes
a partial sum to a workspace, and a second kernel adds them in the same order every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import hopper, launch, tuning
from .geglu import _phi
from .product import (
    GROUP,
    PARTS,
    Product,
    add_parts,
    affine,
    after,
    cuts,
    finish,
    parts_of,
    shape_of,
    steps,
    tile_of,
)


@triton.jit
def _accumulate(
    acc,
    gate,
    x_ptr,
    x_strides,
    w_ptr,
    w_strides,
    channels,
    pixel,
    size,
    column,
    columns,
    first,
    last,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    GEGLU: tl.constexpr,
    WIDEN: tl.constexpr,
    K: tl.constexpr,
):
    """Add steps [first, last) of one source: a step is a place in the window and K channels."""
    image, top, left, exists = pixel
    blocks = tl.cdiv(channels, K)
    of_column = (column * w_strides[0])[None, :]
    wanted = (column < columns)[None, :]
    for step in range(first, last):
        tap = step // blocks
        channel = (step - tap * blocks) * K + tl.arange(0, K)
        inside = channel < channels
        i, j, at = top, left, channel * w_strides[1]
        if TAPS > 1:
            i += tap // KW
            j += tap % KW
            at += tap // KW * w_strides[2] + tap % KW * w_strides[3]
        seen = exists & (i >= 0) & (i < size[0]) & (j >= 0) & (j < size[1])
        place = image * x_strides[0] + i * x_strides[2] + j * x_strides[3]
        x = tl.load(
            x_ptr + place[:, None] + (channel * x_strides[1])[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        w_place = w_ptr + at[:, None] + of_column
        mask = inside[:, None] & wanted
        w = tl.load(w_place, mask=mask, other=0.0)
        if WIDEN:
            x, w = x.to(acc.dtype), w.to(acc.dtype)
        acc = tl.dot(x, w, acc, input_precision="tf32x3", out_dtype=acc.dtype)
        if GEGLU:
            w = tl.load(w_place + columns * w_strides[0], mask=mask, other=0.0)
            if WIDEN:
                w = w.to(acc.dtype)
            gate = tl.dot(x, w, gate, input_precision="tf32x3", out_dtype=acc.dtype)
    return acc, gate


# Numbers that decide nothing about the program: neither whether addresses are aligned nor its form.
@triton.jit(do_not_specialize=["height", "width", "out_width", "top", "left", "per_part"])
def _product(
    y_ptr,
    y_strides,
    parts_ptr,
    x_ptr,
    x_strides,
    x2_ptr,
    x2_strides,
    w_ptr,
    w_strides,
    epilogue,
    residual_ptr,
    shape,
    channels,
    height,
    width,
    out_width,
    top,
    left,
    per_part,
    STRIDE: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    GEGLU: tl.constexpr,
    WIDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    rows, columns, pixels = shape[0], shape[1], shape[2]
    size = (height, width)
    tile_m, tile_n, part = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(columns, N), GROUP)
    row = tile_m * M + tl.arange(0, M)
    column = tile_n * N + tl.arange(0, N)
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    i = row % pixels // out_width * STRIDE - top
    j = row % pixels % out_width * STRIDE - left
    pixel = (row // pixels, i, j, row < rows)

    acc = tl.zeros([M, N], DTYPE)
    gate = tl.zeros([M, N], DTYPE) if GEGLU else acc
    steps = tl.cdiv(channels[0], K) * TAPS
    first, last = part * per_part, (part + 1) * per_part
    begin, end = tl.minimum(first, steps), tl.minimum(last, steps)
    acc, gate = _accumulate(
        acc, gate, x_ptr, x_strides, w_ptr, w_strides, channels[0], pixel, size, column, columns,
        begin, end, KW, TAPS, GEGLU, WIDEN, K,
    )  # fmt: skip
    if x2_ptr is not None:
        more = tl.cdiv(channels[1], K) * TAPS
        begin = tl.minimum(tl.maximum(first - steps, 0), more)
        end = tl.minimum(tl.maximum(last - steps, 0), more)
        w_ptr += channels[0] * w_strides[1]
        acc, gate = _accumulate(
            acc, gate, x2_ptr, x2_strides, w_ptr, w_strides, channels[1], pixel, size, column,
            columns, begin, end, KW, TAPS, GEGLU, WIDEN, K,
        )  # fmt: skip

    if parts_ptr is not None:
        row = row + part * rows
        mask = (row < (part + 1) * rows)[:, None] & (column < columns)[None, :]
        tl.store(parts_ptr + (row * columns)[:, None] + column[None, :], acc, mask=mask)
    else:
        acc = affine(acc, epilogue, row, column, 0, shape, DTYPE)
        if GEGLU:
            gate = affine(gate, epilogue, row, column, columns, shape, DTYPE)
            acc = acc * (gate * _phi(gate))
        finish(acc, y_ptr, residual_ptr, y_strides, row, column, shape, DTYPE)


class Config(NamedTuple):
    """A tile, what computes it, and into how many parts the sum is cut."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1


def configs(p: Product) -> list[Config]:
    """Candidates, the first being the guess where nothing is measured."""
    if p.x.dtype == torch.float64:
        return [Config(32, 32, 16, 4, 2)]
    if p.x.dtype == torch.float32:
        half = Config(32, 64, 32, 4, 2)
        return [half] if p.geglu else [Config(64, 64, 32, 4, 2), half]
    large, small = Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)
    if p.geglu:  # two tiles of w
        large, small = Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3)
    narrow = Config(128, 64, 64, 4, 3)
    sm = launch.multiprocessors(p.x.device)
    every = (large, narrow, small)
    tiles = {c: triton.cdiv(p.shape[0], c.m) * triton.cdiv(p.shape[1], c.n) for c in every}
    found = [large, narrow, small] if tiles[large] >= sm else [small, narrow, large]
    if p.geglu:
        return list(dict.fromkeys(found))
    # Fewer tiles than multiprocessors: parts of the sum fill the rest.
    parts = min(PARTS, sm // tiles[small], steps(p, small.k) // 8)
    if parts > 1:
        found.insert(0, small._replace(parts=parts))
        wide = min(PARTS, sm // tiles[large], steps(p, large.k) // 8)
        found.append(large._replace(parts=max(wide, 2)))
    for config in every:
        found += [config._replace(parts=n) for n in cuts(p, tiles[config], config.k)]
    return list(dict.fromkeys(found))


def run(name: str, p: Product) -> None:
    """Launch the product under the config that was measured fastest."""
    if not p.y.numel():
        return
    by_descriptors = hopper.fits(p)
    dense = p.x_strides[1] == 1, p.w_strides[1] == 1, p.y_strides[2] == 1
    key = (p.shape, p.channels, p.window, p.stride, str(p.x.dtype), p.geglu, *dense, by_descriptors)
    candidates = [*configs(p), *(hopper.configs(p) if by_descriptors else ())]
    _launch(p, tuning.choose(name, key, candidates, lambda c: _launch(p, c), p.x.device))


def _launch(p: Product, config: Config | hopper.Persistent) -> None:
    if isinstance(config, hopper.Persistent):
        hopper.launch_product(p, config)
        return
    dtype = launch.accumulator(p.x.dtype)
    per_part, partial = parts_of(p, config)
    parts = 1 if partial is None else len(partial)
    rows, columns, _ = p.shape
    meta = {"DTYPE": dtype, "WIDE": launch.wide(p.x, p.x2, p.w, p.y, partial), "device": p.x.device}
    launch.launch(
        _product,
        (triton.cdiv(rows, config.m) * triton.cdiv(columns, config.n) * parts,),
        p.y,
        p.y_strides,
        partial,
        p.x,
        p.x_strides,
        p.x2,
        p.x2_strides,
        p.w,
        p.w_strides,
        *after(p, partial),
        shape_of(p),
        p.channels,
        *p.size,
        p.out_width,
        *p.pads,
        per_part,
        STRIDE=p.stride,
        KW=p.window[1],
        TAPS=p.window[0] * p.window[1],
        GEGLU=p.geglu,
        WIDEN=launch.INTERPRETED,  # whose products of bfloat16 are those of its bit patterns
        GROUP=GROUP,
        M=config.m,
        N=config.n,
        K=config.k,
        num_warps=config.warps,
        num_stages=config.stages,
        **meta,
    )
    if partial is not None:
        add_parts(p, partial, **meta)
