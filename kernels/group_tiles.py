"""Tiles of a norm over groups of channels: some pixels by a run of channels, [S, R].

A run is a few whole groups, as many as fit R: in channels_last a group's channels are often fewer
than a memory transaction, and no multiple of the 16 bytes that a thread reads at once, while a run
of several groups is both. Sums are made per channel first and per group after that.

A tensor [B, C, S] lies by any strides; UNIT says which neighbours in it are neighbours in memory:
"c", "s" or neither. VEC divides every offset at which a tile's neighbours begin, ALIGN those of its
runs. Nothing else about sizes is known when a kernel is compiled, so that a few programs serve all
layers of a model.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .layout import format_of

Strides = tuple[int, int, int]  # image, channel, pixel

RUN = 128  # channels of a run in channels_last, unless one group is wider
GROUPS = 16  # of a run, at most; tiles are padded to it
# Arguments whose values differ from layer to layer. Those in tuples are specialised in any case,
# on being 1 or a multiple of 16, which in a model nearly all are.
SIZES = ("parts", "width", "each", "chunk", "chunks", "batch")


@triton.jit
def locate(
    shape,
    parts,
    width,
    each,
    R: tl.constexpr,
    G: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Image, part of the space, run and groups of this program.

    The run is (its first channel, channels from there, which of them exist), the groups are (their
    numbers, which of them exist, whether a channel is of a group: [G, R]).
    """
    channels, groups, program = shape[0], shape[2], tl.program_id(0)
    blocks = tl.cdiv(groups, each)
    image = program // (parts * blocks)
    block = program // parts % blocks
    start = tl.multiple_of(block * (each * width), ALIGN)
    c = tl.arange(0, R)
    exists = c < tl.multiple_of(tl.minimum(each * width, channels - start), ALIGN)
    i = tl.arange(0, G)
    g = block * each + i
    known = (i < each) & (g < groups)
    member = (c[None, :] // width == i[:, None]) & exists[None, :]
    if WIDE:
        image, start = image.to(tl.int64), start.to(tl.int64)
    return image, program % parts, (start, c, exists), (g, known, member)


@triton.jit
def pixels(tile, space, S: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Those of the tile'th tile, and which of them exist; UNIT is that of the first source."""
    i = tl.arange(0, S)
    left = space - tile * S
    if UNIT == "s":
        left = tl.multiple_of(left, VEC)
    s = tile * S + i
    return s.to(tl.int64) if WIDE else s, i < left


@triton.jit
def pointers(ptr, strides, image, start, c, s, UNIT: tl.constexpr, VEC: tl.constexpr):
    """Those of the tile, [S, R], in a tensor with strides (b, c, s)."""
    ptr += tl.multiple_of(image.to(tl.int64) * strides[0], VEC)
    if UNIT == "c":
        rows = tl.multiple_of(s * strides[2], VEC)
        return ptr + (rows[:, None] + (tl.multiple_of(start, VEC) + c)[None, :])
    if UNIT == "s":
        columns = tl.multiple_of((start + c) * strides[1], VEC)
        return ptr + (columns[None, :] + s[:, None])
    return ptr + ((s * strides[2])[:, None] + ((start + c) * strides[1])[None, :])


@triton.jit
def of_image(ptr, strides, row_ptr, stride, image, run, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """What a table with strides (row, image) has for the run, [R]; ``stride`` is that of rows."""
    start, c, exists = run
    place = image * strides[1]
    if row_ptr is not None:
        place += tl.load(row_ptr + image * stride) * strides[0]
    place = tl.multiple_of(place, ALIGN) + start
    return tl.load(ptr + place + c, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def load(
    sources,
    strides,
    image,
    run,
    s,
    inside,
    first,
    UNIT: tl.constexpr,
    UNIT2: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """v = x + add, [S, R], 0 outside; a channel comes from x or, behind its last one, from x2."""
    x_ptr, x2_ptr, add_ptr, row_ptr = sources
    start, c, exists = run
    valid = inside[:, None] & exists[None, :]
    x = pointers(x_ptr, strides[0], image, start, c, s, UNIT, VEC)
    if x2_ptr is None:
        v = tl.load(x, mask=valid, other=0.0).to(DTYPE)
    else:
        ours = (c < tl.multiple_of(first - start, ALIGN))[None, :]
        v = tl.load(x, mask=valid & ours, other=0.0).to(DTYPE)
        x2 = pointers(x2_ptr, strides[1], image, start - first, c, s, UNIT2, VEC)
        v += tl.load(x2, mask=valid & (ours == 0), other=0.0).to(DTYPE)
    if add_ptr is not None:
        add = of_image(add_ptr, strides[2], row_ptr, strides[3], image, run, ALIGN, DTYPE)
        v = tl.where(valid, v + add[None, :], 0.0)
    return v, valid


@triton.jit
def affine(tables, strides, image, run, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """weight, bias, 1 + scale and shift of the run, [R]."""
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, row_ptr = tables
    start, c, exists = run
    weight = tl.load(weight_ptr + start + c, mask=exists, other=0.0).to(DTYPE)
    bias = tl.load(bias_ptr + start + c, mask=exists, other=0.0).to(DTYPE)
    factor = tl.full(weight.shape, 1.0, DTYPE)
    shift = tl.zeros(weight.shape, DTYPE)
    if scale_ptr is not None:
        factor += of_image(scale_ptr, strides[0], row_ptr, strides[2], image, run, ALIGN, DTYPE)
    if shift_ptr is not None:
        shift += of_image(shift_ptr, strides[1], row_ptr, strides[2], image, run, ALIGN, DTYPE)
    return weight, bias, factor, shift


@triton.jit
def per_group(member, value):
    """Sums over the channels of each group, [R] to [G]."""
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def per_channel(member, value):
    """Each channel's group's value, [G] to [R]; 0 where there is none."""
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


class Tiling(NamedTuple):
    """How the work on a shape is cut."""

    S: int
    R: int
    each: int  # groups of a run
    runs: int  # in all images
    tiles: int  # of S pixels
    chunks: int  # parts of the space that are reduced apart
    chunk: int  # tiles of one


class Operands(NamedTuple):
    """The tensors of a call as the kernels see them."""

    sources: tuple[Tensor | None, ...]  # x, x2, add, row
    source_strides: tuple[
        Any, ...
    ]  # theirs; that of row is from image to image, 0 where all share one
    tables: tuple[Tensor | None, ...]  # weight, bias, scale, shift, row
    table_strides: tuple[Any, ...]  # of scale, shift and row
    others: tuple[Strides, ...]  # strides of what is walked beside the sources
    batch: int
    channels: int
    first: int  # channels of x
    space: int
    groups: int
    wide: bool  # whether an offset needs 64 bits

    @property
    def dtype(self) -> torch.dtype:
        assert self.sources[0] is not None
        return self.sources[0].dtype

    def shape(self, q: Tiling, parts: int) -> tuple[tuple[int, ...], int, int, int]:
        """The sizes that every kernel takes; ``parts`` of the space."""
        width = self.channels // self.groups
        return (self.channels, self.space, self.groups, self.first), parts, width, q.each

    def meta(self, q: Tiling) -> dict[str, Any]:
        """The constants that every kernel takes."""
        constants = {
            "R": q.R,
            "G": GROUPS,
            "WIDE": self.wide,
            "DTYPE": launch.accumulator(self.dtype),
        }
        return constants | {"ALIGN": self._vector(q) if "c" in map(unit, self._walked) else 1}

    def walk(self, q: Tiling) -> dict[str, Any]:
        """The constants of the kernels that walk over the image."""
        units = {"UNIT": unit(self._walked[0]), "UNIT2": unit(self._walked[1])}
        return {**self.meta(q), **units, "S": q.S, "VEC": self._vector(q)}

    @property
    def _walked(self) -> tuple[Strides, ...]:
        return *self.source_strides[:2], *self.others

    def _vector(self, q: Tiling) -> int:
        """Elements of 16 bytes, or fewer, that divide all offsets where neighbours begin."""
        found = 16 // self.dtype.itemsize
        for strides in self._walked:
            found = gcd(found, strides[0])
            if unit(strides) == "c":
                run = q.each * self.channels // self.groups
                tables = (*self.source_strides[2], *self.table_strides[0], *self.table_strides[1])
                found = gcd(found, run, self.channels, self.first, *tables)
                found = gcd(found, strides[2]) if self.space > 1 else found
            if unit(strides) == "s":
                found = gcd(found, strides[1], self.space, q.S)
        return found


def unit(strides: Strides) -> str:
    """Whether the channels ("c") or the pixels ("s") are neighbours in memory; neither: ""."""
    return "c" if strides[1] == 1 else "s" if strides[2] == 1 else ""


def operands(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None,
    row: Tensor | None,
    *others: Tensor | None,
) -> Operands:
    """Views where the strides allow it, copies where they don't.

    ``others`` are walked beside the sources.
    """
    x, x_strides = strided(x)
    x2, x2_strides = (None, (0, 0, 0)) if x2 is None else strided(x2)
    (add, at_add), (scale, at_scale), (shift, at_shift) = map(_table, (add, scale, shift))
    per_image = 0 if row is None or len(row) == 1 else row.stride(0)
    channels = weight.shape[0]
    walked = [value for value in others if value is not None]
    return Operands(
        (x, x2, add, row),
        (x_strides, x2_strides, at_add, per_image),
        (weight.contiguous(), bias.contiguous(), scale, shift, row),
        (at_scale, at_shift, per_image),
        tuple(strided(value)[1] for value in walked),
        x.shape[0],
        channels,
        x.shape[1],
        x[0, 0].numel() if x.shape[0] else 0,
        num_groups,
        # The gradient's sums have three numbers for each image and channel.
        launch.wide(x, x2, add, scale, shift, *walked) or 3 * x.shape[0] * channels >= 2**31,
    )


def strided(value: Tensor) -> tuple[Tensor, Strides]:
    """``value`` and its strides [B, C, S]; a copy where the space does not collapse."""
    strides = launch.image_strides(value)
    if strides is None:
        value = value.contiguous()
        strides = value.stride(0), value.stride(1), 1
    return value, strides


def _table(value: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """A table [R, B or 1, C] and its strides (row, image); a [B, C] has no rows to stride over."""
    if value is None:
        return None, (0, 0)
    if value.stride(-1) != 1:
        value = value.contiguous()
    return value, (value.stride(0), value.stride(-2) if value.shape[-2] > 1 else 0)


def result_like(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty [B, channels, ...] in the layout of a result: channels_last stays channels_last."""
    shape = (x.shape[0], channels or x.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))


def run_of(p: Operands, most: int) -> tuple[int, int]:
    """Groups of a run, and its padded width: ``most`` channels, more where one run needs them.

    Where the pixels are neighbours, a run is one group: more would be padded more.
    """
    width, line = p.channels // p.groups, 16 // p.dtype.itemsize
    if unit(p.source_strides[0]) != "c":
        return 1, launch.power_of_2(width)
    whole = line // gcd(line, width)  # groups, so that the next run begins where 16 bytes do
    least = width * whole if width * whole <= RUN else width
    R = launch.power_of_2(max(min(most, p.channels), least))
    each = min(R // width, p.groups, GROUPS)
    return (each // whole * whole if each >= whole else each), R
