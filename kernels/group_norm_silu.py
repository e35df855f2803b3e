"""GroupNorm with the time embedding before it and scale, shift and SiLU behind it.

    v = x + add[b, c]                         u = (v - mean_g) * rstd_g
    p = u * weight[c] + bias[c]               z = p * (1 + scale[b, c]) + shift[b, c]
    y = z * sigmoid(z)                        (or z)

Layout: [B, C, S] by strides, so that NCHW and channels_last are one kernel; the channels of ``x2``
follow those of x without being copied together. add, scale and shift are [B, C], or tables
[R, B or 1, C] whose row is picked by a number on the device; their last dimension is contiguous,
the other strides are free. ``group_tiles.py`` has the tiles, pixels by a run of whole groups. Where
one holds all pixels, one launch reads once and writes once. Otherwise ``_statistics`` reduces
chunks of each image, enough of them to fill the GPU at batch 1, and ``_normalize`` merges their
results (the second read mostly comes from L2).
The backward twin is ``group_norm_silu_backward.py``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, statistics, tuning
from .group_tiles import (
    RUN,
    SIZES,
    Operands,
    Tiling,
    affine,
    load,
    locate,
    operands,
    per_channel,
    per_group,
    pixels,
    pointers,
    result_like,
    run_of,
    strided,
    unit,
)

# Elements that a program keeps in registers, after padding to powers of two. A gradient has more
# beside them, and so has a layout whose neighbours are pixels: with more than half, they spill.
SLAB = 32768
# Chunks of an image that are reduced apart, at most: each program of the next launch reads all.
CHUNKS = 64


@triton.jit
def two_pass(v, valid, member, count):
    """Mean and sum of squared deviations of each group, [G], and the deviations, [S, R].

    The second pass takes out what rounding left of the mean.
    """
    mean = per_group(member, tl.sum(v, 0)) / count
    deviation = tl.where(valid, v - per_channel(member, mean)[None, :], 0.0)
    rest = per_group(member, tl.sum(deviation, 0)) / count
    deviation = tl.where(valid, deviation - per_channel(member, rest)[None, :], 0.0)
    return mean + rest, per_group(member, tl.sum(deviation * deviation, 0)), deviation


@triton.jit
def merged(
    parts_ptr, image, of, shape, width, chunks, chunk, S: tl.constexpr, CHUNKS: tl.constexpr
):
    """Mean and squared deviations of groups from their chunks', parts [B, groups, 2, CHUNKS].

    What lies behind the last chunk was never written: it is read, in whole lines, and dropped.
    """
    space, groups = shape[1], shape[2]
    g, known, _ = of
    i = tl.arange(0, CHUNKS)
    place = parts_ptr + ((image * groups + g) * (2 * CHUNKS))[:, None] + i[None, :]
    written = known[:, None] & (i < chunks)[None, :]
    mean = tl.where(written, tl.load(place, mask=known[:, None], other=0.0), 0.0)
    m2 = tl.where(written, tl.load(place + CHUNKS, mask=known[:, None], other=0.0), 0.0)
    count = tl.minimum(tl.maximum(space - i * (chunk * S), 0), chunk * S) * width
    count = tl.broadcast_to(count.to(mean.dtype)[None, :], mean.shape)
    mean, m2, _ = statistics.merge(count, mean, m2, 1)
    return mean, m2


@triton.jit
def inverse(m2, count, eps, DTYPE: tl.constexpr):
    """1 / deviation."""
    return 1.0 / tl.sqrt(m2 / count + tl.full((), eps, DTYPE))


@triton.jit(do_not_specialize=SIZES)
def _statistics(
    parts_ptr,
    sources,
    strides,
    shape,
    parts,
    width,
    each,
    chunk,
    UNIT: tl.constexpr,
    UNIT2: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Each place of the tile keeps the moments of what it sees; they are merged at the end."""
    space, groups, first = shape[1], shape[2], shape[3]
    image, part, run, of = locate(shape, parts, width, each, R, G, ALIGN, WIDE)
    count = tl.zeros([S], DTYPE)
    mean = tl.zeros([S, R], DTYPE)
    m2 = tl.zeros([S, R], DTYPE)
    # Inside a loop, Triton 3.6 loses the constants of nested tuples.
    sources, strides = sources[:], strides[:]
    for tile in range(part * chunk, tl.minimum((part + 1) * chunk, tl.cdiv(space, S))):
        s, inside = pixels(tile, space, S, UNIT, VEC, WIDE)
        v, valid = load(
            sources, strides, image, run, s, inside, first, UNIT, UNIT2, VEC, ALIGN, DTYPE
        )
        count += inside.to(DTYPE)
        delta = tl.where(valid, v - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += delta * tl.where(valid, v - mean, 0.0)
    counts = tl.broadcast_to(count[:, None], mean.shape)
    mean, m2, seen = statistics.merge(counts, mean, m2, 0)  # per channel
    g, known, member = of
    whole = per_group(member, mean) / width
    deviation = mean - per_channel(member, whole)
    place = parts_ptr + (image * groups + g) * (2 * CHUNKS) + part
    tl.store(place, whole, mask=known)
    m2 = per_group(member, m2 + seen * deviation * deviation)
    tl.store(place + CHUNKS, m2, mask=known)


@triton.jit(do_not_specialize=SIZES)
def _normalize(
    y_ptr,
    y_strides,
    parts_ptr,
    sources,
    strides,
    tables,
    table_strides,
    shape,
    parts,
    width,
    each,
    chunks,
    chunk,
    eps: tl.float64,
    SILU: tl.constexpr,
    FUSED: tl.constexpr,
    Y_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT2: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    image, part, run, of = locate(shape, parts, width, each, R, G, ALIGN, WIDE)
    s, inside = pixels(part, shape[1], S, UNIT, VEC, WIDE)
    v, valid = load(
        sources, strides, image, run, s, inside, shape[3], UNIT, UNIT2, VEC, ALIGN, DTYPE
    )
    member = of[2]
    count = tl.full((), shape[1], DTYPE) * width
    if FUSED:
        _, m2, deviation = two_pass(v, valid, member, count)
    else:
        mean, m2 = merged(parts_ptr, image, of, shape, width, chunks, chunk, S, CHUNKS)
        deviation = v - per_channel(member, mean)[None, :]
    rstd = per_channel(member, inverse(m2, count, eps, DTYPE))
    weight, bias, factor, shift = affine(tables, table_strides, image, run, ALIGN, DTYPE)
    u = deviation * rstd[None, :]
    z = (u * weight[None, :] + bias[None, :]) * factor[None, :] + shift[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    start, c, _ = run
    tl.store(pointers(y_ptr, y_strides, image, start, c, s, Y_UNIT, VEC), z, mask=valid)


class Config(NamedTuple):
    """How the work is cut: whole groups per program or not, channels of a run, elements, warps."""

    fused: bool
    run: int
    tile: int
    warps: int


def configs(p: Operands, arrays: int, device: torch.device) -> list[Config]:
    """Candidates, the first being the guess where nothing is measured.

    ``arrays`` is how many arrays of a tile's size live in registers: one forward, two backward.
    """
    split = Config(False, RUN, 8192 // arrays, 8)
    _, R = run_of(p, 64)
    slab = launch.power_of_2(p.space) * R
    held = slab * arrays
    if held > (SLAB if arrays == 1 and unit(p.source_strides[0]) == "c" else SLAB // 2):
        return [split]
    fused = Config(True, 64, slab, 4 if held <= 4096 else 8 if held <= 16384 else 16)
    # A large group keeps one multiprocessor busy for long: with few of them, splitting may win.
    few = p.batch * p.groups < launch.multiprocessors(device) and slab >= 8192
    return [fused, split] if few else [fused]


def tiling(config: Config, p: Operands, device: torch.device) -> Tiling:
    """Tile sizes and grid of a config."""
    each, R = run_of(p, config.run)
    whole = launch.power_of_2(p.space)
    S = whole if config.fused else min(max(config.tile // R, 1), whole)
    runs = p.batch * triton.cdiv(p.groups, each)
    tiles = triton.cdiv(p.space, S)
    wanted = triton.cdiv(2 * launch.multiprocessors(device), runs)  # programs for every SM
    chunk = triton.cdiv(tiles, max(1, min(wanted, CHUNKS, tiles)))
    return Tiling(S, R, each, runs, tiles, triton.cdiv(tiles, chunk), chunk)


def reduce_statistics(p: Operands, q: Tiling, config: Config, device: torch.device) -> Tensor:
    """The chunks' means and squared deviations, [B, groups, 2, CHUNKS]."""
    dtype = launch.torch_accumulator(p.dtype)
    parts = torch.empty(p.batch, p.groups, 2, CHUNKS, dtype=dtype, device=device)
    launch.launch(
        _statistics,
        (q.runs * q.chunks,),
        parts,
        p.sources,
        p.source_strides,
        *p.shape(q, q.chunks),
        q.chunk,
        device=device,
        num_warps=config.warps,
        CHUNKS=CHUNKS,
        **p.walk(q),
    )
    return parts


def tune(
    name: str,
    p: Operands,
    run: Callable[[Config], None],
    device: torch.device,
    arrays: int = 1,
) -> Config:
    """The config for this class of shapes: sizes to a power of two, layout, dtype, sources."""
    sizes = tuple(launch.power_of_2(n) for n in (p.batch, p.channels, p.space))
    two = p.sources[1] is not None
    key = (*sizes, p.groups, unit(p.source_strides[0]), str(p.dtype), two)
    return tuning.choose(name, key, configs(p, arrays, device), run, device)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """y like x with the channels of both sources, in x's memory format."""
    y = result_like(x, weight.shape[0])
    if not y.numel():
        return y
    p = operands(x, num_groups, weight, bias, add, scale, shift, x2, row, y)
    y_strides = strided(y)[1]

    def run(config: Config) -> None:
        q = tiling(config, p, x.device)
        parts = None if config.fused else reduce_statistics(p, q, config, x.device)
        launch.launch(
            _normalize,
            (q.runs * q.tiles,),
            y,
            y_strides,
            parts,
            p.sources,
            p.source_strides,
            p.tables,
            p.table_strides,
            *p.shape(q, q.tiles),
            q.chunks,
            q.chunk,
            eps,
            device=x.device,
            num_warps=config.warps,
            SILU=silu,
            FUSED=config.fused,
            Y_UNIT=unit(y_strides),
            CHUNKS=CHUNKS,
            **p.walk(q),
        )

    run(tune("group_norm_silu", p, run, x.device))
    return y
