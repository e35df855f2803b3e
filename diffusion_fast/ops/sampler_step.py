"""One step of any sampler, from a table row: guidance, x0, update, history, next model input.

With a fixed time grid every sampler is linear in what it keeps, so a step is one row of numbers:

    m   = m_uncond + guidance * (m_cond - m_uncond)
    x0  = clamp(a * x + b * m, -clip, clip)
    x'  = c_x * x + c_0 * x0 + c_1 * h1 + c_2 * h2 + c_3 * h3 + c_y * y + c_m * m + c_u * u + s * z
    y'  = d_x * x + d_0 * x0 + d_1 * h1 + d_2 * h2 + d_3 * h3 + d_y * y + d_u * u
    (h3, h2, h1) <- (h2, h1, e_x * x + e_0 * x0 + e_m * m + e_u * u)    # they stay if all e are 0

u is m_uncond as the model returned it; with one half of guidance it is m.
A term whose coefficient is 0 is not read: 0 * NaN would be NaN. ``samplers/`` computes the rows.

A row is a sampler's step, so images of one batch need not share one: with a step for each image,
each reads its own row, of its own sampler, guidance and number of steps.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.columns import COLUMNS
from . import philox as _philox
from .dispatch import Op, checks, triton
from .philox import Philox

Coefficients = Sequence[float] | Sequence[Tensor]  # on the host; on the device, as 0-dim tensors


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor | list[list[float]],
    step: int | Tensor,
    *,
    noise: Tensor | Philox | None = None,
    y: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    model_input: Tensor | None = None,
    peak: Tensor | None = None,
    scratch: Sequence[Tensor] | None = None,
    rescale: bool = True,
    unconditional: bool = True,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
) -> None:
    """Advance a sampler by one row, or each image by its own, in place; no autograd.

    Args:
        x: the state, [B, ...], float32 (float64 for float64 models); becomes x'.
        model_output: [B, ...] from one half of guidance, or [2B, ...] with the unconditional half
            first. Any floating dtype and memory format.
        table: float64 [N, len(COLUMNS)], one row per model call, columns as in :data:`COLUMNS`.
            For an int step it is on the host, best as ``table.tolist()``.
        step: the row. An int, or an int64 tensor [1] beside a table on the device of ``x``, which
            is then read by the kernel and never by the host: that it names a row is the caller's
            duty there. Or int64 [B], a row for each image, beside ``cond`` and ``uncond``.
        noise: z, like ``x``; needed by rows with s != 0. Or z of every row, [N, *x.shape], of which
            row ``step`` is read (not with a row for each image); or a
            :class:`~diffusion_fast.ops.Philox`, whose offset ``step`` is added to, one for all
            images or, with a row for each image, one for each (:meth:`~.Philox.for_images`).
        y: the kept sample, like ``x``; becomes y'. None if no row uses it.
        h1, h2, h3: the history, like ``x``: mostly the last x0; shifted. None if no row uses it.
        model_input: [B, ...] or [2B, ...], any floating dtype and memory format; x' is written to
            it (to both halves).
        peak: [N], of the dtype of ``x``, zero before the step; peak[step] becomes max |m|, or NaN
            if m holds one: the first row that is not finite is the step where a model went wrong.
            With a row for each image, that of the image's own m.
        scratch: four tensors like ``x``, so that the reference allocates nothing.
        rescale: False promises that no row of a table on the device rescales guidance, which saves
            a kernel the statistics.
        unconditional: False promises that no row of a table on the device reads u.
        cond, uncond: int64 [B]: where in ``model_output``, now [R, ...] with any R, image i has its
            conditional and unconditional output. Where both are one, m is that output. They go
            together, and with a row for each image; that they name outputs is the caller's duty.

    Guidance rescale (Lin et al. 2023, eq. 15-16) brings the guided output's standard deviation per
    image towards that of the conditional one, by the row's ``rescale`` in [0, 1].

    Raises:
        ValueError: a shape, dtype or device that doesn't match, or a row that reads what is
            missing.

    Examples:
        >>> table = df.samplers.make_table("ddim", df.DiffusionSchedule(), steps=4)
        >>> x = torch.ones(1, 4, 8, 8)
        >>> for row in range(4):
        ...     model_output = torch.zeros_like(x)  # a network's, for x at this row's time
        ...     df.ops.sampler_step(x, model_output, table.rows, row)
        >>> round(x.mean().item(), 3)  # without noise to take away, each step only scales
        17.407
    """
    rows = len(table)
    noise, stream = (None, noise.state) if isinstance(noise, Philox) else (noise, None)
    tensors = noise, y, h1, h2, h3, model_input, peak, stream
    if not isinstance(step, Tensor):
        if not isinstance(step, numbers.Integral) or not 0 <= step < rows:
            checks.fail("step", f"an index in [0, {rows})", step)
        if isinstance(table, Tensor) and table.device.type != "cpu":
            checks.fail("table", "a table on the host for an int step", table.device)
        if not torch.compiler.is_compiling():
            if isinstance(table, Tensor):
                _check_table(table)
            if peak is not None and len(peak) != rows:
                checks.fail("peak", f"{x.dtype} [N] = [{rows}]", f"{peak.dtype} {list(peak.shape)}")
            _check_noise_rows(noise, rows, x)
            row = table[step].tolist() if isinstance(table, Tensor) else table[step]
            more = rescale, unconditional, cond, uncond, row, int(step), scratch or ()
            return _OP(x, model_output, None, None, *tensors, *more)
        # In a trace the row would become a constant of the graph.
        step = torch.full((1,), step, dtype=torch.int64, device=x.device)
    if not isinstance(table, Tensor):
        table = torch.tensor(table, dtype=torch.float64)
    more = rescale, unconditional, cond, uncond, (), 0, ()
    return _OP(x, model_output, table.to(x.device), step, *tensors, *more)


def _check(
    x: Any,
    model_output: Any,
    table: Any,
    step: Any,
    noise: Any,
    y: Any,
    h1: Any,
    h2: Any,
    h3: Any,
    model_input: Any,
    peak: Any,
    stream: Any,
    rescale: bool,
    unconditional: bool,
    cond: Any,
    uncond: Any,
    row: Sequence[float],
    index: int,
    scratch: Sequence[Tensor],
) -> None:
    checks.tensor("x", x)
    if x.dtype not in (torch.float32, torch.float64):
        checks.fail("x", "dtype torch.float32 or torch.float64", x.dtype)
    if cond is None and uncond is None:
        _check_halves("model_output", model_output, x)
    else:
        _check_images(x, model_output, step, cond, uncond, noise)
    if model_input is not None:
        _check_halves("model_input", model_input, x)
    if stream is not None:
        _philox.check_device("noise", stream, x)
        if stream.dim() > 1 and (cond is None or stream.shape != (len(x), 2)):
            expected = "one Philox, or one for each image beside a step for each"
            checks.fail("noise", expected, f"those of {len(stream)} images")
    for name, value in (("y", y), ("h1", h1), ("h2", h2), ("h3", h3), ("noise", noise)):
        if value is not None:
            checks.tensor(name, value)
            of_rows = name == "noise" and value.dim() == x.dim() + 1
            checks.like(name, value[0] if of_rows else value, "x", x)
    for name, value, before in (("h2", h2, h1), ("h3", h3, h2)):
        if value is not None and before is None:
            checks.fail(name, f"None, because h{int(name[1]) - 1} is", "a tensor")
    if peak is not None and peak.dtype != x.dtype:
        checks.fail("peak", f"{x.dtype} [N]", f"{peak.dtype} {list(peak.shape)}")
    if table is None:
        if len(row) != len(COLUMNS):
            checks.fail("table", f"rows of {len(COLUMNS)} numbers", f"{len(row)} of them")
        return
    _check_table(table)
    if cond is None and (step.dtype != torch.int64 or step.shape != (1,)):
        checks.fail("step", "an int, or torch.int64 [1]", f"{step.dtype} {list(step.shape)}")
    checks.same_device("step", step, "x", x)
    checks.same_device("table", table, "x", x)
    _check_noise_rows(noise, len(table), x)
    if peak is not None and len(peak) != len(table):
        checks.fail("peak", f"{x.dtype} [N] = [{len(table)}]", list(peak.shape))


def _check_table(table: Tensor) -> None:
    if table.shape[-1:] != (len(COLUMNS),) or table.dtype != torch.float64:
        checks.fail("table", f"float64 [N, {len(COLUMNS)}]", f"{table.dtype} {list(table.shape)}")


def _check_noise_rows(noise: Tensor | None, rows: int, x: Tensor) -> None:
    """A kernel finds row ``step`` of a table of noise by its address."""
    if noise is not None and noise.dim() > x.dim() and len(noise) < rows:
        checks.fail("noise", f"a row for each of the table's {rows}", len(noise))


def _check_halves(name: str, value: Any, x: Tensor) -> None:
    """[B, ...] or, with both halves of guidance, [2B, ...], floating and beside ``x``."""
    checks.floating(name, value)
    if value.shape[1:] != x.shape[1:] or len(value) not in (len(x), 2 * len(x)):
        expected = f"shape {list(x.shape)} (or twice the batch, for both halves of guidance)"
        checks.fail(name, expected, list(value.shape))
    checks.same_device(name, value, "x", x)


def _check_images(
    x: Tensor, model_output: Any, step: Any, cond: Any, uncond: Any, noise: Any
) -> None:
    """A step, and the place of both outputs, for each image."""
    checks.floating("model_output", model_output)
    if model_output.shape[1:] != x.shape[1:] or not len(model_output):
        checks.fail("model_output", f"shape [R, ...] beside {list(x.shape)}", model_output.shape)
    checks.same_device("model_output", model_output, "x", x)
    for name, value in (("step", step), ("cond", cond), ("uncond", uncond)):
        if (
            not isinstance(value, Tensor)
            or value.dtype != torch.int64
            or value.shape != x.shape[:1]
        ):
            got = value
            if isinstance(value, Tensor):
                got = f"{value.dtype} {list(value.shape)}"
            checks.fail(name, f"torch.int64 [B] = [{len(x)}], as each image has its own row", got)
        checks.same_device(name, value, "x", x)
    if noise is not None and noise.dim() > x.dim():
        checks.fail("noise", "noise like x, as each image has its own row", list(noise.shape))


def _check_row(
    x: Any,
    model_output: Any,
    table: Any,
    step: Any,
    noise: Any,
    y: Any,
    h1: Any,
    h2: Any,
    h3: Any,
    model_input: Any,
    peak: Any,
    stream: Any,
    rescale: bool,
    unconditional: bool,
    cond: Any,
    uncond: Any,
    row: Sequence[float],
    *_: Any,
) -> None:
    """A row on the host must not read a tensor that is not there."""
    if not row:
        return
    drawn = stream if noise is None else noise
    given = {"noise": (drawn, "s"), "y": (y, "c_y")}
    given |= {"h1": (h1, "c_1"), "h2": (h2, "c_2"), "h3": (h3, "c_3")}
    if y is not None:  # else y' is not computed
        given |= {"h1": (h1, "c_1 d_1"), "h2": (h2, "c_2 d_2"), "h3": (h3, "c_3 d_3")}
    for name, (value, columns) in given.items():
        if value is None and any(row[COLUMNS.index(column)] for column in columns.split()):
            checks.fail(name, "a tensor, because this row of the table reads it", None)


def _noise(
    x: Tensor, step: int | Tensor, noise: Tensor | None, stream: Tensor | None
) -> Tensor | None:
    """z of this row: as given, row ``step`` of a table of noise, or drawn."""
    if stream is not None:
        seed, offset = stream.to(x.device).unbind(-1)
        at = step if isinstance(step, int) or stream.dim() > 1 else step[0]
        return _philox.normal(torch.stack((seed, offset + at), -1), x.shape, x.dtype)
    if noise is not None and noise.dim() > x.dim():
        return noise[step] if isinstance(step, int) else noise.index_select(0, step)[0]
    return noise


def reference(
    x: Tensor,
    model_output: Tensor,
    table: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None,
    y: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    model_input: Tensor | None,
    peak: Tensor | None,
    stream: Tensor | None,
    rescale: bool,
    unconditional: bool,
    cond: Tensor | None,
    uncond: Tensor | None,
    row: Sequence[float],
    index: int,
    scratch: Sequence[Tensor],
) -> None:
    """A step by a row of floats and its number, or by rows of ``table`` picked on the device.

    On the device coefficients stay tensors; on the host nothing is read from a device.
    """
    at: int | Tensor = index
    coefficients: Coefficients = row
    if cond is not None and uncond is not None:
        assert table is not None
        assert step is not None  # checked, both
        picked = table.index_select(0, step).to(x.dtype)  # [B, columns]
        at, coefficients = step, picked.view(len(x), -1, *(1,) * (x.dim() - 1)).unbind(1)
    elif table is not None and step is not None:
        at, coefficients = step, table.index_select(0, step)[0].to(x.dtype).unbind()
    elif row[COLUMNS.index("s")] == 0:
        stream = None
    z = _noise(x, at, noise, stream)
    outputs = None if cond is None or uncond is None else (uncond, cond)
    _step(
        *(x, model_output, coefficients, at, z, y, h1, h2, h3, model_input, peak, unconditional),
        *(scratch, outputs),
    )


def _step(
    x: Tensor,
    model_output: Tensor,
    row: Coefficients,
    step: int | Tensor,
    noise: Tensor | None,
    y: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    model_input: Tensor | None,
    peak: Tensor | None,
    unconditional: bool,
    scratch: Sequence[Tensor],
    outputs: tuple[Tensor, Tensor] | None,
) -> None:
    a, b, clip, c_x, c_0, c_1, c_2, c_3, c_y, c_m, c_u, s = row[:12]
    d_x, d_0, d_1, d_2, d_3, d_y, d_u, e_x, e_0, e_m, e_u, g, rescale = row[12:]
    on_host = isinstance(step, int)
    accumulate: Callable[..., None] = _accumulate if on_host else _accumulate_on_device
    if not scratch:
        scratch = x.new_empty((4, *x.shape)).unbind()
    m_buffer, x0, y_next, newest = scratch

    m = model_output
    u = m[: len(x)]
    if outputs is not None:
        first, second = (m.index_select(0, places).to(x.dtype) for places in outputs)
        u = first
        m = _guided(first, second, g, rescale, m_buffer)
        one = (outputs[0] == outputs[1]).view(-1, *(1,) * (x.dim() - 1))
        m = torch.where(one, second, m)
    elif m.shape != x.shape:
        first, second = m.to(x.dtype).chunk(2)
        m = _guided(first, second, g, rescale, m_buffer)
    alone = u if on_host or unconditional else None
    if peak is not None:
        torch.abs(m if m.dtype == x.dtype else m.to(x.dtype), out=x0)
        if outputs is not None:
            # Idle images may share a row, whose peak nobody asks for.
            peak.index_copy_(0, torch.as_tensor(step), x0.flatten(1).amax(1))
        elif isinstance(step, int):
            torch.amax(x0, (), out=peak[step])
        else:
            peak.index_copy_(0, step, torch.amax(x0)[None])

    if not on_host or c_0 or d_0 or h1 is not None:
        accumulate(x0, (a, x), (b, m))
        if isinstance(clip, Tensor):
            torch.clamp(x0, -clip, clip, out=x0)
        elif clip != math.inf:
            x0.clamp_(-clip, clip)

    if y is not None:
        accumulate(
            y_next, (d_x, x), (d_0, x0), (d_1, h1), (d_2, h2), (d_3, h3), (d_y, y), (d_u, alone)
        )
    stays = on_host and not (e_x or e_0 or e_m or e_u)
    if h1 is not None and not stays:
        accumulate(newest, (e_x, x), (e_0, x0), (e_m, m), (e_u, alone))
    # x' takes the place of x, so the term that reads x comes first.
    history = (c_1, h1), (c_2, h2), (c_3, h3)
    accumulate(x, (c_x, x), (c_0, x0), *history, (c_y, y), (c_m, m), (c_u, alone), (s, noise))

    if y is not None:
        y.copy_(y_next)
    if h1 is not None and not stays:
        places = [h for h in (h1, h2, h3) if h is not None]
        entering: list[Tensor] = [newest, *places[:-1]]
        if not on_host:
            kept = torch.stack([torch.as_tensor(e) for e in (e_x, e_0, e_m, e_u)]).eq(0).all(0)
            entering = [torch.where(kept, *pair) for pair in zip(places, entering, strict=True)]
        for place, value in reversed(list(zip(places, entering, strict=True))):
            place.copy_(value)
    if model_input is not None:
        for half in model_input.split(len(x)):
            half.copy_(x)


def _guided(
    uncond: Tensor, cond: Tensor, g: float | Tensor, rescale: float | Tensor, out: Tensor
) -> Tensor:
    """u + g * (c - u), in ``out``."""
    torch.lerp(uncond, cond, g, out=out)
    if isinstance(rescale, Tensor) or rescale:
        dims = tuple(range(1, out.dim()))
        target = cond.std(dims, correction=0, keepdim=True)
        std = out.std(dims, correction=0, keepdim=True)
        # A constant image has no deviation to bring anywhere: 0 / 0.
        factor = torch.where(std == 0, 1.0, 1 + rescale * (target / std - 1))
        if isinstance(rescale, Tensor):
            factor = torch.where(rescale == 0, 1.0, factor)
        out.mul_(factor)
    return out


def _accumulate(out: Tensor, *terms: tuple[float, Tensor]) -> None:
    """out = sum of coefficient * tensor. ``out`` itself may stand in the first term only."""
    empty = True
    for coefficient, value in terms:
        if coefficient == 0:
            continue
        if empty:
            torch.mul(value, coefficient, out=out)
            empty = False
        else:
            out.add_(value, alpha=coefficient)
    if empty:
        out.zero_()


def _accumulate_on_device(out: Tensor, *terms: tuple[Tensor, Tensor | None]) -> None:
    """The same with coefficients that the host must not read: a zero hides its term.

    A tensor that is None is a promise of the caller's that no row reads it.
    """
    products = [
        torch.where(coefficient == 0, 0.0, coefficient * value.to(out.dtype))
        for coefficient, value in terms
        if value is not None
    ]
    out.copy_(products[0])
    for product in products[1:]:
        out.add_(product)


_OP = Op(
    "sampler_step",
    reference,
    lambda *_: None,
    public=sampler_step,
    check=_check,
    values=_check_row,
    mutates=("x", "y", "h1", "h2", "h3", "model_input", "peak"),
    data=3,
)


def _kernels() -> ModuleType:
    from ..kernels import sampler_step

    return sampler_step


def _kernel_supports(
    x: Tensor,
    model_output: Tensor,
    table: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None,
    y: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    model_input: Tensor | None,
    peak: Tensor | None,
    *_: Any,
) -> list[str]:
    """The state is walked as memory lies, and changed in place: there is no copying it first."""
    if x.dtype not in (torch.float32, torch.float64):
        return [f"x is {x.dtype}, not float32 or float64"]
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not (last or x.is_contiguous()):
        return ["x is neither contiguous nor channels_last"]
    for name, value in (("noise", noise), ("y", y), ("h1", h1), ("h2", h2), ("h3", h3)):
        if value is not None:
            one = value[0] if value.dim() > x.dim() else value
            strides = zip(one.stride(), x.stride(), x.shape, strict=True)
            if any(a != b for a, b, n in strides if n > 1) or one.dtype != x.dtype:
                return [f"{name} has other strides or another dtype than x"]
    if model_input is not None and not _collapses(model_input):
        return ["the image dimensions of model_input are not one block of memory"]
    if peak is not None and not (
        peak.dtype == x.dtype and peak.device == x.device and peak.is_contiguous()
    ):
        return ["peak has another dtype or device than x, or gaps"]
    return ["an image of 2^31 elements or more"] if x[0:1].numel() >= 2**31 else []


def _collapses(value: Tensor) -> bool:
    """Whether [B, C, ...] is [B, C, S] with one stride for S."""
    space = [(n, s) for n, s in zip(value.shape[2:], value.stride()[2:], strict=True) if n > 1]
    return all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(space))


triton.add(_OP, _kernels, _kernel_supports)
