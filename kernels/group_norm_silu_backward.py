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

from . import launch
from .group_norm_silu import (
    _affine,
    _load,
    _merged,
    _places,
    _rstd,
    _tile,
    _two_pass,
    operands,
    reduce_statistics,
    result_like,
    tiling,
    tune,
)


@triton.jit
def _dz(u, dy, affine, SILU: tl.constexpr):
    """Gradient before SiLU: silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))."""
    weight, bias, factor, shift = affine
    if SILU:
        z = (u * weight[None, :, :] + bias[None, :, :]) * factor[None, :, :] + shift[None, :, :]
        gate = tl.sigmoid(z)
        dy = dy * gate * (1.0 + z * (1.0 - gate))
    return dy


@triton.jit
def _store_sums(sums_ptr, row, channel, exists, channels, a, d, u):
    """A, D and U of the tile's channels into row ``row`` of [rows, 3, C]."""
    place = row * 3 * channels + channel
    tl.store(sums_ptr + place, a, mask=exists)
    tl.store(sums_ptr + place + channels, d, mask=exists)
    tl.store(sums_ptr + place + 2 * channels, u, mask=exists)


@triton.jit
def _sums(
    sums_ptr,
    dy_ptr,
    dy_strides,
    parts_ptr,
    sources,
    tables,
    shape,
    chunk,
    eps: tl.float64,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """A, D, U of one chunk: sums [B, chunks, 3, C]."""
    channels, space, chunks = shape[0], shape[1], shape[3]
    image, part, g, channel, exists = _tile(tl.program_id(0), shape, WIDE, WIDTH, G, C)
    count = tl.full((), space, DTYPE) * WIDTH
    mean, m2 = _merged(parts_ptr, image, g, shape, chunks, chunk, WIDTH, PADDED)
    rstd = _rstd(m2, count, eps, DTYPE)
    affine = _affine(tables, image, channel, exists, DTYPE)
    sum_a = tl.zeros([G, C], DTYPE)
    sum_d = tl.zeros([G, C], DTYPE)
    sum_u = tl.zeros([G, C], DTYPE)
    sources = sources[:]  # inside a loop, Triton 3.6 loses the constants of nested tuples
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, space), S):
        s = start + tl.arange(0, S)
        v, valid = _load(sources, image, s, channel, exists, shape, DTYPE, WIDE)
        place = _places(s, channel, image, dy_strides, WIDE)
        dy = tl.load(dy_ptr + place, mask=valid, other=0.0).to(DTYPE)
        u = tl.where(valid, (v - mean[None, :, None]) * rstd[None, :, None], 0.0)
        dz = _dz(u, dy, affine, SILU)
        sum_a += tl.sum(dz, 0)
        sum_d += tl.sum(dz * u, 0)
        sum_u += tl.sum(u, 0)
    _store_sums(sums_ptr, image * chunks + part, channel, exists, channels, sum_a, sum_d, sum_u)


@triton.jit
def _gradient(
    outputs,
    dy_ptr,
    dy_strides,
    parts_ptr,
    means_ptr,
    sums_ptr,
    sources,
    tables,
    shape,
    eps: tl.float64,
    SILU: tl.constexpr,
    FUSED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """dx (and dx2). FUSED: a tile is whole groups, so statistics and sums are made on the way."""
    channels, space, groups, first = shape[0], shape[1], shape[2], shape[4]
    image, part, g, channel, exists = _tile(tl.program_id(0), shape, WIDE, WIDTH, G, C)
    s = part * S + tl.arange(0, S)
    v, valid = _load(sources, image, s, channel, exists, shape, DTYPE, WIDE)
    place = _places(s, channel, image, dy_strides, WIDE)
    dy = tl.load(dy_ptr + place, mask=valid, other=0.0).to(DTYPE)
    affine = _affine(tables, image, channel, exists, DTYPE)
    weight, _, factor, _ = affine
    count = tl.full((), space, DTYPE) * WIDTH
    place = image * groups + g
    if FUSED:
        mean, m2 = _two_pass(v, valid, count)
        tl.store(parts_ptr + place * 2, mean, mask=g < groups)
        tl.store(parts_ptr + place * 2 + 1, m2, mask=g < groups)
        rstd = _rstd(m2, count, eps, DTYPE)
    else:
        mean = tl.load(means_ptr + place * 4, mask=g < groups, other=0.0)
        rstd = tl.load(means_ptr + place * 4 + 1, mask=g < groups, other=0.0)
    u = tl.where(valid, (v - mean[None, :, None]) * rstd[None, :, None], 0.0)
    dz = _dz(u, dy, affine, SILU)
    if FUSED:
        a = tl.sum(dz, 0)
        d = tl.sum(dz * u, 0)
        _store_sums(sums_ptr, image, channel, exists, channels, a, d, tl.sum(u, 0))
        m1 = tl.sum(weight * factor * a, 1) / count
        m2 = tl.sum(weight * factor * d, 1) / count
    else:
        m1 = tl.load(means_ptr + place * 4 + 2, mask=g < groups, other=0.0)
        m2 = tl.load(means_ptr + place * 4 + 3, mask=g < groups, other=0.0)
    dv = dz * (weight * factor)[None, :, :] - m1[None, :, None] - u * m2[None, :, None]
    dv = dv * rstd[None, :, None]
    dx_ptr, dx_strides, dx2_ptr, dx2_strides = outputs
    if dx2_ptr is None:
        tl.store(dx_ptr + _places(s, channel, image, dx_strides, WIDE), dv, mask=valid)
    else:
        ours = (channel < first)[None, :, :]
        tl.store(dx_ptr + _places(s, channel, image, dx_strides, WIDE), dv, mask=valid & ours)
        place = _places(s, channel - first, image, dx2_strides, WIDE)
        tl.store(dx2_ptr + place, dv, mask=valid & (ours == 0))


@triton.jit
def _parameters(
    outputs,
    means_ptr,
    parts_ptr,
    sums_ptr,
    tables,
    shape,
    batch,
    chunks,
    chunk,
    eps: tl.float64,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients of the parameters, and (mean, rstd, m1, m2) per group for ``_gradient``."""
    dweight_ptr, dbias_ptr, dadd_ptr, dscale_ptr, dshift_ptr = outputs
    channels, space, groups = shape[0], shape[1], shape[2]
    g = tl.program_id(0) * G + tl.arange(0, G)
    c = tl.arange(0, C)
    channel = g[:, None] * WIDTH + c[None, :]
    exists = (g[:, None] < groups) & (c[None, :] < WIDTH)
    count = tl.full((), space, DTYPE) * WIDTH
    dweight = tl.zeros([G, C], DTYPE)
    dbias = tl.zeros([G, C], DTYPE)
    for i in range(batch):
        image = tl.full((), i, tl.int64 if WIDE else tl.int32)
        weight, bias, factor, _ = _affine(tables, image, channel, exists, DTYPE)
        a = tl.zeros([G, C], DTYPE)
        d = tl.zeros([G, C], DTYPE)
        sum_u = tl.zeros([G, C], DTYPE)
        for part in range(chunks):
            place = (image * chunks + part) * 3 * channels + channel
            a += tl.load(sums_ptr + place, mask=exists, other=0.0)
            d += tl.load(sums_ptr + place + channels, mask=exists, other=0.0)
            sum_u += tl.load(sums_ptr + place + 2 * channels, mask=exists, other=0.0)
        mean, m2 = _merged(parts_ptr, image, g, shape, chunks, chunk, WIDTH, PADDED)
        rstd = _rstd(m2, count, eps, DTYPE)
        m1 = tl.sum(weight * factor * a, 1) / count
        m2 = tl.sum(weight * factor * d, 1) / count
        place = means_ptr + (image * groups + g) * 4
        tl.store(place, mean, mask=g < groups)
        tl.store(place + 1, rstd, mask=g < groups)
        tl.store(place + 2, m1, mask=g < groups)
        tl.store(place + 3, m2, mask=g < groups)
        dweight += factor * d
        dbias += factor * a
        place = image * channels + channel
        if dadd_ptr is not None:
            dv = weight * factor * a - space * m1[:, None] - sum_u * m2[:, None]
            tl.store(dadd_ptr + place, dv * rstd[:, None], mask=exists)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + place, weight * d + bias * a, mask=exists)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + place, a, mask=exists)
    tl.store(dweight_ptr + channel, dweight, mask=exists)
    tl.store(dbias_ptr + channel, dbias, mask=exists)


def group_norm_silu_backward(
    dy, x, num_groups, weight, bias, eps, silu, add, scale, shift, x2=None
):
    """Gradients of x, weight, bias, add, scale, shift and x2; empty where the argument is None."""
    dx = result_like(x)
    dx2 = None if x2 is None else result_like(x2)
    make = torch.empty if dy.numel() else torch.zeros
    small = [
        None if value is None else make(value.shape, dtype=x.dtype, device=x.device)
        for value in (weight, bias, add, scale, shift)
    ]
    if dy.numel():
        if launch.image_strides(dy) is None:
            dy = dy.contiguous()
        p = operands(x, num_groups, weight, bias, add, scale, shift, x2, None, dy, dx, dx2)
        _launch(p, dy, dx, dx2, small, num_groups, eps, silu)
    none = x.new_empty(0)
    results = dx, *small, dx2
    return tuple(none if value is None else value for value in results)


def _launch(p, dy, dx, dx2, small, num_groups, eps, silu):
    device, accumulate = dy.device, launch.torch_accumulator(dy.dtype)
    outputs = dx, launch.image_strides(dx), dx2
    outputs = (*outputs, (0, 0, 0) if dx2 is None else launch.image_strides(dx2))
    gradient = dy, launch.image_strides(dy)

    def run(config):
        sizes = p.batch, p.channels, p.first, p.space
        q = tiling(config, *sizes, num_groups, p.channels_last, device)
        tile = {"S": q.S, "G": q.G, "C": q.C, "num_warps": config.warps}
        padded = launch.power_of_2(q.chunks)
        sums = torch.empty(p.batch, q.chunks, 3, p.channels, dtype=accumulate, device=device)
        means = torch.empty(p.batch, num_groups, 4, dtype=accumulate, device=device)

        def parameters():
            launch.launch(
                _parameters,
                (triton.cdiv(num_groups, q.G),),
                tuple(small),
                means,
                parts,
                sums,
                p.tables,
                q.shape,
                p.batch,
                q.chunks,
                q.chunk,
                eps,
                device=device,
                PADDED=padded,
                G=q.G,
                C=q.C,
                **p.meta,
            )

        if config.fused:
            parts = torch.empty(p.batch, num_groups, 1, 2, dtype=accumulate, device=device)
        else:
            parts = reduce_statistics(p, q, config, device)
            launch.launch(
                _sums,
                (q.blocks * q.chunks,),
                sums,
                *gradient,
                parts,
                p.sources,
                p.tables,
                (*q.shape[:3], q.chunks, q.shape[4]),
                q.chunk,
                eps,
                device=device,
                SILU=silu,
                PADDED=padded,
                **tile,
                **p.meta,
            )
            parameters()
        launch.launch(
            _gradient,
            (q.blocks * q.shape[3],),
            outputs,
            *gradient,
            parts,
            means,
            sums,
            p.sources,
            p.tables,
            q.shape,
            eps,
            device=device,
            SILU=silu,
            FUSED=config.fused,
            **tile,
            **p.meta,
        )
        if config.fused:
            parameters()

    run(tune("group_norm_silu_backward", p, num_groups, run, device, arrays=2))
