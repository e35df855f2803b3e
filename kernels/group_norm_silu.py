"""GroupNorm with the time embedding before it and scale, shift and SiLU behind it.

    v = x + add[b, c]                         u = (v - mean_g) * rstd_g
    p = u * weight[c] + bias[c]               z = p * (1 + scale[b, c]) + shift[b, c]
    y = z * sigmoid(z)                        (or z)

Layout: [B, C, S] by strides, so that NCHW and channels_last are one kernel; the channels of ``x2``
follow those of x without being copied together. add, scale and shift are [B, C], or tables
[R, B or 1, C] whose row is picked by a number on the device; their last dimension is contiguous,
the other strides are free. A tile is [S, groups, channels of a group]. Where a
tile holds whole groups, one launch reads once and writes once. Otherwise ``_statistics`` reduces
chunks of each image, enough of them to fill the GPU at batch 1, and ``_normalize`` merges their
results (the second read mostly comes from L2).
The backward twin is ``group_norm_silu_backward.py``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch, statistics, tuning
from .layout import format_of

# Elements that a program keeps in registers, after padding to powers of two.
SLAB = 32768
# Chunks of an image that are reduced apart, at most: each program of the next launch reads all.
CHUNKS = 64


@triton.jit
def _places(s, channel, image, strides, WIDE: tl.constexpr):
    """Offsets of the tile [S, G, C] in a tensor with strides (b, c, s)."""
    if WIDE:
        s, channel = s.to(tl.int64), channel.to(tl.int64)
    return (
        image.to(tl.int64) * strides[0]
        + s[:, None, None] * strides[2]
        + (channel * strides[1])[None, :, :]
    )


@triton.jit
def _tile(
    program, shape, WIDE: tl.constexpr, WIDTH: tl.constexpr, G: tl.constexpr, C: tl.constexpr
):
    """(image, part of the space, g, channel, whether it exists) of a program."""
    groups, parts = shape[2], shape[3]
    blocks = tl.cdiv(groups, G)
    g = (program // parts) % blocks * G + tl.arange(0, G)
    c = tl.arange(0, C)
    exists = (g[:, None] < groups) & (c[None, :] < WIDTH)
    image = program // (parts * blocks)
    if WIDE:
        image = image.to(tl.int64)
    return image, program % parts, g, g[:, None] * WIDTH + c[None, :], exists


@triton.jit
def _of_image(ptr, strides, row_ptr, image, channel, exists, DTYPE: tl.constexpr):
    """What a table with strides (row, image, of the rows) has for the tile's channels, [G, C]."""
    place = image * strides[1]
    if row_ptr is not None:
        place += tl.load(row_ptr + image * strides[2]) * strides[0]
    return tl.load(ptr + place + channel, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def _load(sources, image, s, channel, exists, shape, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """v = x + add, 0 outside; a channel comes from x or, behind its last one, from x2."""
    x_ptr, x_strides, x2_ptr, x2_strides, add_ptr, add_strides, row_ptr = sources
    first = shape[4]
    valid = (s < shape[1])[:, None, None] & exists[None, :, :]
    if x2_ptr is None:
        place = _places(s, channel, image, x_strides, WIDE)
        v = tl.load(x_ptr + place, mask=valid, other=0.0).to(DTYPE)
    else:
        ours = (channel < first)[None, :, :]
        place = _places(s, channel, image, x_strides, WIDE)
        v = tl.load(x_ptr + place, mask=valid & ours, other=0.0).to(DTYPE)
        place = _places(s, channel - first, image, x2_strides, WIDE)
        v += tl.load(x2_ptr + place, mask=valid & (ours == 0), other=0.0).to(DTYPE)
    if add_ptr is not None:
        add = _of_image(add_ptr, add_strides, row_ptr, image, channel, exists, DTYPE)
        v = tl.where(valid, v + add[None, :, :], 0.0)
    return v, valid


@triton.jit
def _two_pass(v, valid, count):
    """Mean and sum of squared deviations of each group in the tile."""
    mean = tl.sum(tl.sum(v, 2), 0) / count
    deviation = tl.where(valid, v - mean[None, :, None], 0.0)
    return mean, tl.sum(tl.sum(deviation * deviation, 2), 0)


@triton.jit
def _merged(parts_ptr, image, g, shape, chunks, chunk, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Mean and squared deviations of groups from their chunks', parts [B, groups, chunks, 2]."""
    space, groups = shape[1], shape[2]
    i = tl.arange(0, PADDED)
    known = (g[:, None] < groups) & (i[None, :] < chunks)
    place = ((image * groups + g[:, None]) * chunks + i[None, :]) * 2
    mean = tl.load(parts_ptr + place, mask=known, other=0.0)
    m2 = tl.load(parts_ptr + place + 1, mask=known, other=0.0)
    count = tl.minimum(tl.maximum(space - i * chunk, 0), chunk) * WIDTH
    count = tl.broadcast_to(count.to(mean.dtype)[None, :], mean.shape)
    mean, m2, _ = statistics.merge(count, mean, m2, 1)
    return mean, m2


@triton.jit
def _rstd(m2, count, eps, DTYPE: tl.constexpr):
    return 1.0 / tl.sqrt(m2 / count + tl.full((), eps, DTYPE))


@triton.jit
def _affine(tables, image, channel, exists, DTYPE: tl.constexpr):
    """weight, bias, 1 + scale and shift of the tile's channels, [G, C]."""
    weight_ptr, bias_ptr, scale_ptr, scale_strides, shift_ptr, shift_strides, row_ptr = tables
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(DTYPE)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(DTYPE)
    factor = tl.full(weight.shape, 1.0, DTYPE)
    shift = tl.zeros(weight.shape, DTYPE)
    if scale_ptr is not None:
        factor += _of_image(scale_ptr, scale_strides, row_ptr, image, channel, exists, DTYPE)
    if shift_ptr is not None:
        shift += _of_image(shift_ptr, shift_strides, row_ptr, image, channel, exists, DTYPE)
    return weight, bias, factor, shift


@triton.jit
def _statistics(
    parts_ptr,
    sources,
    shape,
    chunk,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    space, groups, chunks = shape[1], shape[2], shape[3]
    image, part, g, channel, exists = _tile(tl.program_id(0), shape, WIDE, WIDTH, G, C)
    count = tl.zeros((), DTYPE)
    mean = tl.zeros([G], DTYPE)
    m2 = tl.zeros([G], DTYPE)
    sources = sources[:]  # inside a loop, Triton 3.6 loses the constants of nested tuples
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, space), S):
        s = start + tl.arange(0, S)
        v, valid = _load(sources, image, s, channel, exists, shape, DTYPE, WIDE)
        n = (tl.minimum(S, space - start) * WIDTH).to(DTYPE)
        tile_mean, tile_m2 = _two_pass(v, valid, n)
        delta = tile_mean - mean
        share = n / (count + n)
        mean += delta * share
        m2 += tile_m2 + delta * delta * (count * share)
        count += n
    place = ((image * groups + g) * chunks + part) * 2
    tl.store(parts_ptr + place, mean, mask=g < groups)
    tl.store(parts_ptr + place + 1, m2, mask=g < groups)


@triton.jit
def _normalize(
    y_ptr,
    y_strides,
    parts_ptr,
    sources,
    tables,
    shape,
    chunks,
    chunk,
    eps: tl.float64,
    SILU: tl.constexpr,
    FUSED: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    image, part, g, channel, exists = _tile(tl.program_id(0), shape, WIDE, WIDTH, G, C)
    s = part * S + tl.arange(0, S)
    v, valid = _load(sources, image, s, channel, exists, shape, DTYPE, WIDE)
    count = tl.full((), shape[1], DTYPE) * WIDTH
    if FUSED:
        mean, m2 = _two_pass(v, valid, count)
    else:
        mean, m2 = _merged(parts_ptr, image, g, shape, chunks, chunk, WIDTH, PADDED)
    u = (v - mean[None, :, None]) * _rstd(m2, count, eps, DTYPE)[None, :, None]
    weight, bias, factor, shift = _affine(tables, image, channel, exists, DTYPE)
    z = (u * weight[None, :, :] + bias[None, :, :]) * factor[None, :, :] + shift[None, :, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y_ptr + _places(s, channel, image, y_strides, WIDE), z, mask=valid)


class Config(NamedTuple):
    """How the work is cut: whole groups per program or not, elements of a tile, warps."""

    fused: bool
    tile: int
    warps: int


class Tiling(NamedTuple):
    """A config applied to a shape; see :func:`tiling`."""

    shape: tuple[int, ...]  # channels, space, groups, parts of the space, channels of x
    S: int
    G: int
    C: int
    blocks: int  # programs per part: images times blocks of groups
    chunks: int
    chunk: int


def configs(batch, channels, space, num_groups, arrays, device):
    """Candidates, the first being the guess where nothing is measured.

    ``arrays`` is how many arrays of a tile's size live in registers: one forward, two backward.
    """
    slab = launch.power_of_2(space) * launch.power_of_2(channels // num_groups)
    split = [Config(False, 4096, 4), Config(False, 8192, 8), Config(False, 2048, 4)]
    held = slab * arrays
    if held > SLAB:
        return split
    fused = Config(True, slab, 4 if held <= 4096 else 8 if held <= 16384 else 16)
    # A large group keeps one multiprocessor busy for long: with few of them, splitting may win.
    few = batch * num_groups < launch.multiprocessors(device) and slab >= 8192
    return [fused, *split[:2]] if few else [fused]


def tiling(config, batch, channels, first, space, num_groups, channels_last, device):
    """Tile sizes and grid of a config."""
    width = channels // num_groups
    C = launch.power_of_2(width)
    # Neighbouring groups are neighbours in memory only in channels_last, where one group's run of
    # channels is shorter than a memory transaction.
    G = min(launch.power_of_2(num_groups), max(64 // C, 1)) if channels_last else 1
    if config.fused:
        S = launch.power_of_2(space)
        G = min(G, max(4096 // (S * C), 1))
        blocks = batch * triton.cdiv(num_groups, G)
        return Tiling((channels, space, num_groups, 1, first), S, G, C, blocks, 1, space)
    S = min(max(config.tile // (G * C), 1), launch.power_of_2(space))
    blocks = batch * triton.cdiv(num_groups, G)
    wanted = triton.cdiv(2 * launch.multiprocessors(device), blocks)  # programs for every SM
    chunks = max(1, min(wanted, CHUNKS, triton.cdiv(space, S)))
    chunk = triton.cdiv(triton.cdiv(space, chunks), S) * S
    shape = (channels, space, num_groups, triton.cdiv(space, S), first)
    return Tiling(shape, S, G, C, blocks, triton.cdiv(space, chunk), chunk)


class Operands(NamedTuple):
    """The tensors of a call as the kernels see them."""

    sources: tuple  # x, its strides, x2, its strides, add, its strides, row
    tables: tuple  # weight, bias, scale, its strides, shift, its strides, row
    batch: int
    channels: int
    first: int
    space: int
    channels_last: bool
    meta: dict  # constants that forward and backward share


def operands(x, num_groups, weight, bias, add, scale, shift, x2, row, *others):
    """Views where the strides allow it, copies where they don't.

    ``others`` are walked beside the sources: offsets are as wide as the widest of all needs.
    """
    x, x_strides = _strided(x)
    x2, x2_strides = (None, (0, 0, 0)) if x2 is None else _strided(x2)
    channels = weight.shape[0]
    return Operands(
        (x, x_strides, x2, x2_strides, *_table(add, row), row),
        (weight.contiguous(), bias.contiguous(), *_table(scale, row), *_table(shift, row), row),
        x.shape[0],
        channels,
        x.shape[1],
        x[0, 0].numel() if x.shape[0] else 0,
        x_strides[1] == 1 and x.dim() > 2,
        {
            "DTYPE": launch.accumulator(x.dtype),
            # The gradient's sums have three numbers for each image and channel.
            "WIDE": launch.wide(x, x2, add, scale, shift, *others)
            or 3 * x.shape[0] * channels >= 2**31,
            "WIDTH": channels // num_groups,
        },
    )


def _strided(value):
    strides = launch.image_strides(value)
    if strides is None:
        value = value.contiguous()
        strides = launch.image_strides(value)
    return value, strides


def _table(value, row):
    """A table [R, B or 1, C] and its strides (row, image); a [B, C] has no rows to stride over.

    The third stride is that of ``row`` from image to image, 0 where all images share one.
    """
    if value is None:
        return None, (0, 0, 0)
    if value.stride(-1) != 1:
        value = value.contiguous()
    image = value.stride(-2) if value.shape[-2] > 1 else 0
    return value, (value.stride(0), image, 0 if row is None or len(row) == 1 else row.stride(0))


def result_like(x, channels=None):
    """An empty [B, channels, ...] in the layout of a result: channels_last stays channels_last."""
    shape = (x.shape[0], channels or x.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))


def reduce_statistics(p, q, config, device):
    """The chunks' means and squared deviations, [B, groups, chunks, 2]."""
    groups = q.shape[2]
    dtype = launch.torch_accumulator(p.sources[0].dtype)
    parts = torch.empty(p.batch, groups, q.chunks, 2, dtype=dtype, device=device)
    shape = (*q.shape[:3], q.chunks, q.shape[4])
    grid = (q.blocks * q.chunks,)
    options = {**p.meta, "S": q.S, "G": q.G, "C": q.C, "num_warps": config.warps}
    launch.launch(_statistics, grid, parts, p.sources, shape, q.chunk, device=device, **options)
    return parts


def tune(name, p, num_groups, run, device, arrays=1):
    """The config for this class of shapes: sizes to a power of two, layout, dtype, sources."""
    sizes = tuple(launch.power_of_2(n) for n in (p.batch, p.channels, p.space))
    two = p.sources[2] is not None
    key = (*sizes, num_groups, p.channels_last, str(p.sources[0].dtype), two)
    candidates = configs(p.batch, p.channels, p.space, num_groups, arrays, device)
    return tuning.choose(name, key, candidates, run, device)


def group_norm_silu(x, num_groups, weight, bias, eps, silu, add, scale, shift, x2=None, row=None):
    """y like x with the channels of both sources, in x's memory format."""
    y = result_like(x, weight.shape[0])
    if not y.numel():
        return y
    p = operands(x, num_groups, weight, bias, add, scale, shift, x2, row, y)

    def run(config):
        sizes = p.batch, p.channels, p.first, p.space
        q = tiling(config, *sizes, num_groups, p.channels_last, x.device)
        parts = None if config.fused else reduce_statistics(p, q, config, x.device)
        launch.launch(
            _normalize,
            (q.blocks * q.shape[3],),
            y,
            launch.image_strides(y),
            parts,
            p.sources,
            p.tables,
            q.shape,
            q.chunks,
            q.chunk,
            eps,
            device=x.device,
            SILU=silu,
            FUSED=config.fused,
            PADDED=launch.power_of_2(q.chunks),
            S=q.S,
            G=q.G,
            C=q.C,
            num_warps=config.warps,
            **p.meta,
        )

    run(tune("group_norm_silu", p, num_groups, run, x.device))
    return y
