"""Calls of every launcher at the models' shapes, with tensors on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from diffusion_fast.kernels import (
    add_noise,
    conv2d,
    decoupled_attention,
    geglu,
    group_norm_silu,
    group_norm_silu_backward,
    layer_norm,
    linear,
    residual,
    row_statistics,
    sampler_step,
    weighted_mse,
)
from diffusion_fast.kernels.columns import COLUMNS

from ..ops import shapes

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def meta(*size: int, dtype: torch.dtype = BF16, last: bool = False) -> torch.Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(op, name of the case, a call of its launchers)."""
    yield from _norm_cases(quick)
    yield from _table_cases(quick)
    yield from _row_cases(quick)
    yield from _latent_cases(quick)
    yield from _product_cases(quick)
    yield from _context_cases(quick)


def _norm_cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    chosen = [c for c in shapes.GROUP_NORM if not quick or c[1:] in ((64, 640, 320), (16, 1280, 0))]
    for model, side, first, second in chosen:
        # A second source stands for a residual block; without one there are also the norms before
        # attention, which have neither SiLU nor anything added.
        kinds = [True] if quick or second else [True, False]
        # The models run in channels_last; of the other layout, a few shapes are enough.
        layouts = (True, False) if model == "sd15" and side in (16, 64) and not quick else (True,)
        for last, silu in itertools.product(layouts, kinds):
            channels = first + second
            x = meta(2, first, side, side, last=last)
            x2 = meta(2, second, side, side, last=last) if second else None
            weight, add = meta(channels), meta(2, channels) if silu else None
            args = (shapes.GROUPS, weight, weight, 1e-5, silu, add, None, None, x2)
            dy = meta(2, channels, side, side, last=last)
            name = f"{model} {side}x{side} {first}+{second} {'NHWC' if last else 'NCHW'}"
            name += "" if silu else " plain"
            yield (
                "group_norm_silu",
                name,
                partial(group_norm_silu.group_norm_silu, x, *args),
            )
            yield (
                "group_norm_silu",
                name,
                partial(group_norm_silu_backward.group_norm_silu_backward, dy, x, *args),
            )


def _table_cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """The norms of a sampling loop: the time is a row of a table, picked on the device."""
    row = torch.empty(1, dtype=torch.int64, device="meta")
    for side, channels in ((16, 1280),) if quick else ((64, 320), (16, 1280)):
        x, weight = meta(2, channels, side, side, last=True), meta(channels)
        table = meta(50, 1, channels)
        args = (shapes.GROUPS, weight, weight, 1e-5, True, table, None, None, None, row)
        name = f"sd15 {side}x{side} {channels} NHWC table"
        yield "group_norm_silu", name, partial(group_norm_silu.group_norm_silu, x, *args)


def _row_cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    for model, rows, width in shapes.LAYER_NORM[1:2] if quick else shapes.LAYER_NORM:
        x, weight, name = meta(rows, width), meta(width), f"{model} {rows}x{width}"
        yield "layer_norm", name, partial(layer_norm.layer_norm, x, weight, weight, 1e-5)
        yield (
            "layer_norm",
            name,
            partial(layer_norm.layer_norm_backward, x, x, weight, 1e-5),
        )
        yield "row_statistics", name, partial(row_statistics.row_statistics, x, 1e-5)
    for model, rows, width in shapes.GEGLU[1:2] if quick else shapes.GEGLU:
        x, dy, name = meta(rows, 2 * width), meta(rows, width), f"{model} {rows}x{width}"
        yield "geglu", name, partial(geglu.geglu, x)
        yield "geglu", name, partial(geglu.geglu_backward, dy, x)
    for model, side, channels in shapes.RESIDUAL[:1] if quick else shapes.RESIDUAL:
        x, bias = meta(2, channels, side, side, last=True), meta(channels)
        name = f"{model} {side}x{side} {channels}"
        yield "residual", name, partial(residual.residual, x, x, bias, 0.5, 1)
        yield "residual", name, partial(residual.residual_backward, x, 0.5, 1, True)


def _latent_cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    t, table = torch.empty(256, dtype=torch.int64, device="meta"), meta(1000, dtype=F32)
    state = torch.empty(2, dtype=torch.int64, device="meta")
    rows, step = meta(50, len(COLUMNS), dtype=F64), torch.empty(1, dtype=torch.int64, device="meta")
    for model, batch, side in shapes.LATENTS[:1] if quick else shapes.LATENTS:
        name = f"{model} {batch}x4x{side}x{side}"
        for dtype in (F32,) if quick else (F32, BF16):
            x, kind = meta(batch, 4, side, side, dtype=dtype), f"{name} {str(dtype)[6:]}"
            at = t[:batch], table, table
            yield "add_noise", kind, partial(add_noise.add_noise, x, x, *at, True)
            yield (
                "add_noise",
                f"{kind} philox",
                partial(add_noise.add_noise_philox, x, state, *at, "epsilon"),
            )
            yield "add_noise", kind, partial(add_noise.add_noise_backward, x, x, *at, True)
            weight = meta(batch, dtype=F32)
            yield "weighted_mse", kind, partial(weighted_mse.weighted_mse, x, x, weight)
            yield (
                "weighted_mse",
                kind,
                partial(weighted_mse.weighted_mse_backward, weight[0], x, x, weight),
            )
        if batch > 2:
            continue
        x, both = meta(1, 4, side, side, dtype=F32), meta(2, 4, side, side, last=True)
        peak = meta(50, dtype=F32)
        for noise, stream in ((x, None), (None, state)):
            kind = f"{model} 1x4x{side}x{side}" + (" philox" if stream is not None else "")
            yield (
                "sampler_step",
                kind,
                partial(
                    sampler_step.sampler_step,
                    *(x, both, rows, step, noise, x, x, x, None, both, peak, stream),
                    unconditional=False,
                ),
            )
        images = torch.empty(1, dtype=torch.int64, device="meta")
        streams = torch.empty(1, 2, dtype=torch.int64, device="meta")
        for noise, stream in ((x, None), (None, streams)):
            kind = f"{model} 1x4x{side}x{side} rows" + (" philox" if stream is not None else "")
            yield (
                "sampler_step",
                kind,
                partial(
                    sampler_step.sampler_step,
                    *(x, both, rows, images, noise, x, x, x, None, x.bfloat16(), peak, stream),
                    *(True, False, images, images),
                ),
            )
        yield (
            "sampler_step",
            f"{model} 1x4x{side}x{side} all columns",
            partial(sampler_step.sampler_step, x, both, rows, step, x, x, x, x, x, both, peak),
        )
        row = tuple(0.0 if name.endswith("_u") else 0.5 for name in COLUMNS)
        yield (
            "sampler_step",
            f"{model} 1x4x{side}x{side} host row",
            partial(
                sampler_step.sampler_step,
                *(x, both, None, None, x, x, x, x, None, both, peak),
                row=row,
                index=3,
            ),
        )


# Those of shapes.LINEAR and shapes.CONV2D whose programs differ most, and what is before them.
_LINEAR = (
    ((8192, 320, 320), BF16, True),
    ((8192, 320, 320), F32, False),
    ((128, 1280, 5120), BF16, False),
    ((8192, 2560, 320), BF16, False),
    ((8192, 2560, 320), BF16, True),
    ((8192, 2560, 320), F32, False),
)
_CONV2D = ((64, 640, 320, 320, 3, 1), (64, 320, 0, 320, 3, 2), (8, 1280, 0, 1280, 3, 1))


def _product_cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    for shape, dtype, norm in _LINEAR[:3:2] if quick else _LINEAR:
        model, rows, columns, inner, then = next(c for c in shapes.LINEAR if c[1:4] == shape)
        x, weight = meta(rows, inner, dtype=dtype), meta(columns, inner, dtype=dtype)
        residual = meta(rows, columns, dtype=dtype) if then == "residual" else None
        more = meta(columns, dtype=dtype), residual, then == "geglu"
        folded = (*meta(2, rows, dtype=F32), meta(columns, dtype=F32)) if norm else (None,) * 3
        args = (x, weight, *more, *folded, None)
        name = f"{model} {rows}x{columns}x{inner} {then} {str(dtype)[6:]}{' norm' * norm}"
        yield "linear", name, partial(linear.linear, *args)
    chosen = [c for c in shapes.CONV2D if c[1:] in (_CONV2D[::2] if quick else _CONV2D)]
    for model, side, first, second, out, window, stride in chosen:
        x = meta(2, first, side, side, last=True)
        x2 = meta(2, second, side, side, last=True) if second else None
        weight = meta(out, first + second, window, window, last=True)
        after = side // stride
        residual = meta(2, out, after, after, last=True)
        args = (x, weight, meta(out), stride, [window // 2] * 4, x2, meta(2, out), residual, None)
        name = f"{model} {side}x{side} {first}+{second} to {out} {window}x{window} /{stride}"
        yield "conv2d", name, partial(conv2d.conv2d, *args)


def _context_cases(quick: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    chosen = [(case, BF16) for case in (shapes.CONTEXTS[:3] if quick else shapes.CONTEXTS)]
    for (model, queries, heads, dim, tokens), dtype in [*chosen, (shapes.CONTEXTS[0], F32)]:
        q = meta(2, queries, heads, dim, dtype=dtype)
        k = meta(2, shapes.TEXT + tokens, heads, dim, dtype=dtype)
        args = (q, k, k, (shapes.TEXT, tokens), meta(1, 1, 1, dtype=dtype), dim**-0.5, None)
        name = f"{model} {queries}x{dim} {shapes.TEXT}+{tokens} {str(dtype)[6:]}"
        yield "decoupled_attention", name, partial(decoupled_attention.decoupled_attention, *args)
