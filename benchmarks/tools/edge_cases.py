"""Calls of the launchers with odd sizes and the rarer dtypes, on the meta device."""

from __future__ import annotations

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

from .launch_cases import BF16, F32, F64, meta

F16 = torch.float16
Case = tuple[str, str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """(op, name of the case, a call of its launchers)."""
    for dtype in (BF16, F16, F64):  # of float32 there are enough at the models' shapes
        kind = str(dtype)[6:]
        every = (_rows, _products, _norms, _latents, _contexts)
        for op, name, call in [case for cases in every for case in cases(dtype)]:
            yield op, f"{name} {kind}", call
    for dtype in (F32, F64):
        yield from _steps(dtype)


def _rows(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in ((1, 1), (7, 36)):
        x, w, name = meta(rows, width, dtype=dtype), meta(width, dtype=dtype), f"{rows}x{width}"
        yield "layer_norm", name, partial(layer_norm.layer_norm, x, w, w, 1e-5)
        yield "layer_norm", name, partial(layer_norm.layer_norm_backward, x, x, w, 1e-5)
        yield "row_statistics", name, partial(row_statistics.row_statistics, x, 1e-5)
        yield "residual", name, partial(residual.residual, x, x, w, 0.5, 1)
        yield "residual", name, partial(residual.residual_backward, x, 0.5, 1, True)
        both = meta(rows, 2 * width, dtype=dtype)
        yield "geglu", name, partial(geglu.geglu, both)
        yield "geglu", name, partial(geglu.geglu_backward, x, both)


def _products(dtype: torch.dtype) -> Iterator[Case]:
    sums = F64 if dtype == F64 else F32
    for rows, inner, out in ((1, 1, 1), (7, 36, 22)):
        x, w, b = (meta(*n, dtype=dtype) for n in ((rows, inner), (out, inner), (out,)))
        y, name = meta(rows, out, dtype=dtype), f"{rows}x{out}x{inner}"
        folded = meta(rows, dtype=sums), meta(rows, dtype=sums), meta(out, dtype=sums)
        plain = (None, None, None, None)
        yield "linear", name, partial(linear.linear, x, w, None, None, False, *plain)
        yield "linear", f"{name} norm", partial(linear.linear, x, w, b, y, False, *folded, None)
        w2, b2 = meta(2 * out, inner, dtype=dtype), meta(2 * out, dtype=dtype)
        yield "linear", f"{name} geglu", partial(linear.linear, x, w2, b2, None, True, *plain)
    for last in (True,) if dtype == F16 else (False, True):
        for first, second, out, side, window, stride in (
            (4, 0, 320, 8, 3, 1),
            (12, 5, 10, 7, 3, 2),
            (1, 0, 1, 1, 1, 1),
        ):
            x = meta(1, first, side, side, dtype=dtype, last=last)
            x2 = meta(1, second, side, side, dtype=dtype, last=last) if second else None
            w = meta(out, first + second, window, window, dtype=dtype, last=last)
            after = (side - 1) // stride + 1
            y, b = meta(1, out, after, after, dtype=dtype, last=last), meta(out, dtype=dtype)
            pads, add = [window // 2] * 4, meta(1, out, dtype=dtype)
            args = (x, w, b, stride, pads, x2, add, y, None)
            name = f"{side}x{side} {first}+{second} to {out} {'NHWC' if last else 'NCHW'}"
            yield "conv2d", name, partial(conv2d.conv2d, *args)


def _norms(dtype: torch.dtype) -> Iterator[Case]:
    for last in (True,) if dtype == F16 else (False, True):
        for channels, second, groups, side in ((1, 0, 1, 1), (36, 0, 4, 61), (12, 5, 1, 5)):
            x = meta(1, channels, side, side, dtype=dtype, last=last)
            x2 = meta(1, second, side, side, dtype=dtype, last=last) if second else None
            dy = meta(1, channels + second, side, side, dtype=dtype)
            w, a = meta(channels + second, dtype=dtype), meta(1, channels + second, dtype=dtype)
            args = (groups, w, w, 1e-5, True, a, a, a, x2)
            name = f"{side}x{side} {channels}+{second}/{groups} {'NHWC' if last else 'NCHW'}"
            forward, gradient = (
                group_norm_silu.group_norm_silu,
                group_norm_silu_backward.group_norm_silu_backward,
            )
            yield "group_norm_silu", name, partial(forward, x, *args)
            yield "group_norm_silu", f"{name} gradient", partial(gradient, dy, x, *args)


def _latents(dtype: torch.dtype) -> Iterator[Case]:
    t, state = (torch.empty(2, dtype=torch.int64, device="meta") for _ in range(2))
    table, weight = meta(10, dtype=F32), meta(2, dtype=F32)
    x, name = meta(2, 3, 5, 7, dtype=dtype), "2x3x5x7"
    host = torch.tensor([2**62 + 5, 7])
    yield "add_noise", name, partial(add_noise.add_noise, x, x, t, table, table, True)
    for kind in ("epsilon", "v_prediction", "sample"):
        args = (x, state, t, table, table, kind)
        yield "add_noise", f"{name} {kind}", partial(add_noise.add_noise_philox, *args)
    args = (x, host, t, table, table, "epsilon")
    yield "add_noise", f"{name} stream of the host", partial(add_noise.add_noise_philox, *args)
    yield "weighted_mse", name, partial(weighted_mse.weighted_mse, x, x, weight)
    backward = partial(weighted_mse.weighted_mse_backward, weight[0], x, x, weight)
    yield "weighted_mse", name, backward


def _contexts(dtype: torch.dtype) -> Iterator[Case]:
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    for queries, heads, dim, parts, seen in (
        (1, 1, 1, (1,), None),
        (7, 3, 13, (5, 1, 3), lengths),
        (70, 2, 160, (77, 16, 4), lengths.long()),
        (70, 2, 256, (3,) * 16, None),
    ):
        q = meta(2, queries, heads, dim, dtype=dtype)
        k = meta(1 if seen is None else 2, sum(parts), heads, dim, dtype=dtype)
        weights = meta(2, len(parts) - 1, queries, dtype=dtype)
        name = f"{queries}x{dim} {'+'.join(map(str, parts))}"
        run = partial(decoupled_attention.decoupled_attention, q, k, k, parts, weights, 0.5, seen)
        yield "decoupled_attention", name, run


def _steps(dtype: torch.dtype) -> Iterator[Case]:
    rows, step = meta(20, len(COLUMNS), dtype=F64), torch.empty(1, dtype=torch.int64, device="meta")
    peak, state = meta(20, dtype=dtype), torch.empty(2, dtype=torch.int64, device="meta")
    x, both = meta(1, 3, 5, 7, dtype=dtype), meta(2, 3, 5, 7)
    for kind, noise, stream in (("", None, None), (" noise", x, None), (" philox", None, state)):
        name = f"1x3x5x7{kind} {str(dtype)[6:]}"
        args = (x, both, rows, step, noise, x, x, x, x, both, peak, stream)
        yield "sampler_step", name, partial(sampler_step.sampler_step, *args)
