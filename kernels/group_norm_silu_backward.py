"""The gradient of GroupNorm and its neighbours; the twin of ``group_norm_silu.py``.

Backward, with dz = dy * silu'(z), per channel and image: A = sum dz, D = sum dz u, U = sum u. Then

    k     = weight (1 + scale)           m1, m2  = mean_g k dz, mean_g k dz u
    dx    = rstd (k dz - m1 - u m2)      dadd    = rstd (k A - S m1 - U m2)
    dbias = sum_b (1 + scale) A          dweight = sum_b (1 + scale) D
    dshift = A                           dscale  = weight D + bias A

All sums run in a fixed order, in two stages: the gradient has the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .group_norm_silu import (
    CHUNKS,
    Config,
    inverse,
    merged,
    reduce_statistics,
    tiling,
    tune,
    two_pass,
)
from .group_tiles import (
    SIZES,
    Operands,
    affine,
    load,
    locate,
    operands,
    per_channel,
    per_group,
    pixels,
    pointers,
    result_like,
    strided,
    unit,
)


@triton.jit
def _dz(u, dy, weight, bias, factor, shift, SILU: tl.constexpr):
    """Gradient before SiLU: silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))."""
    if SILU:
        z = (u * weight[None, :] + bias[None, :]) * factor[None, :] + shift[None, :]
        gate = tl.sigmoid(z)
        dy = dy * gate * (1.0 + z * (1.0 - gate))
    return dy


@triton.jit
def _store_sums(sums_ptr, row, run, channels, a, d, u):
    """A, D and U of the run into row ``row`` of [rows, 3, C]."""
    start, c, exists = run
    place = row * 3 * channels + start + c
    tl.store(sums_ptr + place, a, mask=exists)
    tl.store(sums_ptr + place + channels, d, mask=exists)
    tl.store(sums_ptr + place + 2 * channels, u, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def _sums(
    sums_ptr,
    dy_ptr,
    dy_strides,
    parts_ptr,
    sources,
    strides,
    tables,
    table_strides,
    shape,
    parts,
    width,
    each,
    chunk,
    eps: tl.float64,
    SILU: tl.constexpr,
    DY_UNIT: tl.constexpr,
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
    """A, D, U of one chunk, the parts being chunks: sums [B, parts, 3, C]."""
    channels, space, first = shape[0], shape[1], shape[3]
    image, part, run, of = locate(shape, parts, width, each, R, G, ALIGN, WIDE)
    start, c, _ = run
    count = tl.full((), space, DTYPE) * width
    mean, m2 = merged(parts_ptr, image, of, shape, width, parts, chunk, S, CHUNKS)
    mean = per_channel(of[2], mean)
    rstd = per_channel(of[2], inverse(m2, count, eps, DTYPE))
    weight, bias, factor, shift = affine(tables, table_strides, image, run, ALIGN, DTYPE)
    sum_a = tl.zeros([S, R], DTYPE)
    sum_d = tl.zeros([S, R], DTYPE)
    sum_u = tl.zeros([S, R], DTYPE)
    # Inside a loop, Triton 3.6 loses the constants of nested tuples.
    sources, strides = sources[:], strides[:]
    for tile in range(part * chunk, tl.minimum((part + 1) * chunk, tl.cdiv(space, S))):
        s, inside = pixels(tile, space, S, UNIT, VEC, WIDE)
        v, valid = load(
            sources, strides, image, run, s, inside, first, UNIT, UNIT2, VEC, ALIGN, DTYPE
        )
        dy = pointers(dy_ptr, dy_strides, image, start, c, s, DY_UNIT, VEC)
        dy = tl.load(dy, mask=valid, other=0.0).to(DTYPE)
        u = tl.where(valid, (v - mean[None, :]) * rstd[None, :], 0.0)
        dz = _dz(u, dy, weight, bias, factor, shift, SILU)
        sum_a += dz
        sum_d += dz * u
        sum_u += u
    row = image * parts + part
    _store_sums(sums_ptr, row, run, channels, tl.sum(sum_a, 0), tl.sum(sum_d, 0), tl.sum(sum_u, 0))


@triton.jit(do_not_specialize=SIZES)
def _gradient(
    outputs,
    out_strides,
    dy_ptr,
    dy_strides,
    parts_ptr,
    means_ptr,
    sums_ptr,
    sources,
    strides,
    tables,
    table_strides,
    shape,
    parts,
    width,
    each,
    eps: tl.float64,
    SILU: tl.constexpr,
    FUSED: tl.constexpr,
    DX_UNIT: tl.constexpr,
    DX2_UNIT: tl.constexpr,
    DY_UNIT: tl.constexpr,
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
    """dx (and dx2). FUSED: a tile is whole groups, so statistics and sums are made on the way."""
    channels, space, groups, first = shape
    image, part, run, of = locate(shape, parts, width, each, R, G, ALIGN, WIDE)
    start, c, _ = run
    g, known, member = of
    s, inside = pixels(part, space, S, UNIT, VEC, WIDE)
    v, valid = load(sources, strides, image, run, s, inside, first, UNIT, UNIT2, VEC, ALIGN, DTYPE)
    dy = pointers(dy_ptr, dy_strides, image, start, c, s, DY_UNIT, VEC)
    dy = tl.load(dy, mask=valid, other=0.0).to(DTYPE)
    weight, bias, factor, shift = affine(tables, table_strides, image, run, ALIGN, DTYPE)
    count = tl.full((), space, DTYPE) * width
    if FUSED:
        mean, m2, deviation = two_pass(v, valid, member, count)
        place = parts_ptr + (image * groups + g) * (2 * CHUNKS)
        tl.store(place, mean, mask=known)
        tl.store(place + CHUNKS, m2, mask=known)
        rstd = per_channel(member, inverse(m2, count, eps, DTYPE))
    else:
        place = means_ptr + (image * groups + g) * 4
        mean = per_channel(member, tl.load(place, mask=known, other=0.0))
        rstd = per_channel(member, tl.load(place + 1, mask=known, other=0.0))
        deviation = tl.where(valid, v - mean[None, :], 0.0)
    u = deviation * rstd[None, :]
    dz = _dz(u, dy, weight, bias, factor, shift, SILU)
    if FUSED:
        a, d = tl.sum(dz, 0), tl.sum(dz * u, 0)
        _store_sums(sums_ptr, image, run, channels, a, d, tl.sum(u, 0))
        m1 = per_group(member, weight * factor * a) / count
        m2 = per_group(member, weight * factor * d) / count
    else:
        m1 = tl.load(place + 2, mask=known, other=0.0)
        m2 = tl.load(place + 3, mask=known, other=0.0)
    m1, m2 = per_channel(member, m1), per_channel(member, m2)
    dv = (dz * (weight * factor)[None, :] - m1[None, :] - u * m2[None, :]) * rstd[None, :]
    dx_ptr, dx2_ptr = outputs
    dx = pointers(dx_ptr, out_strides[0], image, start, c, s, DX_UNIT, VEC)
    if dx2_ptr is None:
        tl.store(dx, dv, mask=valid)
    else:
        ours = (c < tl.multiple_of(first - start, ALIGN))[None, :]
        tl.store(dx, dv, mask=valid & ours)
        dx2 = pointers(dx2_ptr, out_strides[1], image, start - first, c, s, DX2_UNIT, VEC)
        tl.store(dx2, dv, mask=valid & (ours == 0))


@triton.jit(do_not_specialize=SIZES)
def _parameters(
    outputs,
    means_ptr,
    parts_ptr,
    sums_ptr,
    tables,
    table_strides,
    shape,
    parts,
    width,
    each,
    batch,
    chunks,
    chunk,
    eps: tl.float64,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Gradients of the parameters, and (mean, rstd, m1, m2) per group for ``_gradient``."""
    dweight_ptr, dbias_ptr, dadd_ptr, dscale_ptr, dshift_ptr = outputs
    channels, space, groups = shape[0], shape[1], shape[2]
    _, _, run, of = locate(shape, parts, width, each, R, G, ALIGN, WIDE)
    start, c, exists = run
    g, known, member = of
    channel = start + c
    count = tl.full((), space, DTYPE) * width
    dweight = tl.zeros([R], DTYPE)
    dbias = tl.zeros([R], DTYPE)
    for i in range(batch):
        image = tl.full((), i, tl.int64 if WIDE else tl.int32)
        weight, bias, factor, _shift = affine(tables, table_strides, image, run, ALIGN, DTYPE)
        a = tl.zeros([R], DTYPE)
        d = tl.zeros([R], DTYPE)
        sum_u = tl.zeros([R], DTYPE)
        for part in range(chunks):
            place = (image * chunks + part) * 3 * channels + channel
            a += tl.load(sums_ptr + place, mask=exists, other=0.0)
            d += tl.load(sums_ptr + place + channels, mask=exists, other=0.0)
            sum_u += tl.load(sums_ptr + place + 2 * channels, mask=exists, other=0.0)
        mean, m2 = merged(parts_ptr, image, of, shape, width, chunks, chunk, S, CHUNKS)
        rstd = inverse(m2, count, eps, DTYPE)
        m1 = per_group(member, weight * factor * a) / count
        m2 = per_group(member, weight * factor * d) / count
        place = means_ptr + (image * groups + g) * 4
        tl.store(place, mean, mask=known)
        tl.store(place + 1, rstd, mask=known)
        tl.store(place + 2, m1, mask=known)
        tl.store(place + 3, m2, mask=known)
        dweight += factor * d
        dbias += factor * a
        place = image * channels + channel
        if dadd_ptr is not None:
            dv = weight * factor * a - space * per_channel(member, m1)
            dv = (dv - sum_u * per_channel(member, m2)) * per_channel(member, rstd)
            tl.store(dadd_ptr + place, dv, mask=exists)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + place, weight * d + bias * a, mask=exists)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + place, a, mask=exists)
    tl.store(dweight_ptr + channel, dweight, mask=exists)
    tl.store(dbias_ptr + channel, dbias, mask=exists)


def group_norm_silu_backward(
    dy: Tensor,
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
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, add, scale, shift and x2; empty where the argument is None."""
    dx = result_like(x)
    dx2 = None if x2 is None else result_like(x2)
    make = torch.empty if dy.numel() else torch.zeros
    small = [
        None if value is None else make(value.shape, dtype=x.dtype, device=x.device)
        for value in (weight, bias, add, scale, shift)
    ]
    if dy.numel():
        dy = strided(dy)[0]
        p = operands(x, num_groups, weight, bias, add, scale, shift, x2, None, dy, dx, dx2)
        _launch(p, dy, dx, dx2, small, eps, silu)
    none = x.new_empty(0)
    results = dx, *small, dx2
    return tuple(none if value is None else value for value in results)


def _launch(
    p: Operands,
    dy: Tensor,
    dx: Tensor,
    dx2: Tensor | None,
    small: list[Tensor | None],
    eps: float,
    silu: bool,
) -> None:
    device, accumulate = dy.device, launch.torch_accumulator(dy.dtype)
    dx_strides = strided(dx)[1]
    dx2_strides = (0, 0, 0) if dx2 is None else strided(dx2)[1]
    gradient = strided(dy)

    def run(config: Config) -> None:
        q = tiling(config, p, device)
        sums = torch.empty(p.batch, q.chunks, 3, p.channels, dtype=accumulate, device=device)
        means = torch.empty(p.batch, p.groups, 4, dtype=accumulate, device=device)
        walk = {**p.walk(q), "DY_UNIT": unit(gradient[1]), "SILU": silu, "CHUNKS": CHUNKS}
        walk |= {"num_warps": config.warps, "device": device}

        def parameters() -> None:
            launch.launch(
                _parameters,
                (q.runs // p.batch,),
                tuple(small),
                means,
                parts,
                sums,
                p.tables,
                p.table_strides,
                *p.shape(q, 1),
                p.batch,
                q.chunks,
                q.chunk,
                eps,
                device=device,
                S=q.S,
                CHUNKS=CHUNKS,
                **p.meta(q),
            )

        if config.fused:
            shape = p.batch, p.groups, 2, CHUNKS
            parts = torch.empty(shape, dtype=accumulate, device=device)
        else:
            parts = reduce_statistics(p, q, config, device)
            launch.launch(
                _sums,
                (q.runs * q.chunks,),
                sums,
                *gradient,
                parts,
                p.sources,
                p.source_strides,
                p.tables,
                p.table_strides,
                *p.shape(q, q.chunks),
                q.chunk,
                eps,
                **walk,
            )
            parameters()
        launch.launch(
            _gradient,
            (q.runs * q.tiles,),
            (dx, dx2),
            (dx_strides, dx2_strides),
            *gradient,
            parts,
            means,
            sums,
            p.sources,
            p.source_strides,
            p.tables,
            p.table_strides,
            *p.shape(q, q.tiles),
            eps,
            FUSED=config.fused,
            DX_UNIT=unit(dx_strides),
            DX2_UNIT=unit(dx2_strides),
            **walk,
        )
        if config.fused:
            parameters()

    run(tune("group_norm_silu_backward", p, run, device, arrays=2))
