"""One step of any sampler, from a table row: guidance, x0, update, history, next model input.

With a fixed time grid every sampler is linear in what it keeps, so a step is one row of numbers:

    m   = m_uncond + guidance * (m_cond - m_uncond)
    x0  = clamp(a * x + b * m, -clip, clip)
    x'  = c_x * x + c_0 * x0 + c_1 * h1 + c_2 * h2 + c_y * y + c_m * m + s * z
    y'  = d_x * x + d_0 * x0 + d_1 * h1 + d_2 * h2 + d_y * y
    (h2, h1) <- (h1, x0)

A term whose coefficient is 0 is not read: 0 * NaN would be NaN. ``samplers/`` computes the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import checks
from .op import Op

COLUMNS: tuple[str, ...] = (
    *("a", "b", "clip"),
    *("c_x", "c_0", "c_1", "c_2", "c_y", "c_m", "s"),
    *("d_x", "d_0", "d_1", "d_2", "d_y"),
    *("guidance", "rescale"),
)

Row = Sequence[float] | Sequence[Tensor]  # on the host; on the device, as 0-dim tensors


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor | list[list[float]],
    step: int | Tensor,
    *,
    noise: Tensor | None = None,
    y: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    model_input: Tensor | None = None,
    peak: Tensor | None = None,
    scratch: Sequence[Tensor] | None = None,
) -> None:
    """Advance a sampler by one row, in place; no autograd.

    Args:
        x: the state, [B, ...], float32 (float64 for float64 models); becomes x'.
        model_output: [B, ...] from one half of guidance, or [2B, ...] with the unconditional half
            first. Any floating dtype and memory format.
        table: float64 [N, len(COLUMNS)], one row per model call, columns as in :data:`COLUMNS`.
            For an int step it is on the host, best as ``table.tolist()``.
        step: the row. An int, or an int64 tensor [1] beside a table on the device of ``x``, which
            is then read by the kernel and never by the host.
        noise: z, like ``x``; needed by rows with s != 0.
        y: the kept sample, like ``x``; becomes y'. None if no row uses it.
        h1, h2: the last two x0, like ``x``; shifted. None if no row uses them.
        model_input: [B, ...] or [2B, ...], any floating dtype and memory format; x' is written to
            it (to both halves).
        peak: [N], of the dtype of ``x``; peak[step] becomes max |m|, or NaN if m holds one.
        scratch: three tensors like ``x``, so that the reference allocates nothing.

    Guidance rescale (Lin et al. 2023, eq. 15-16) brings the guided output's standard deviation per
    image towards that of the conditional one, by the row's ``rescale`` in [0, 1].

    Raises:
        ValueError: a shape, dtype or device that doesn't match, or a row that reads what is
            missing.
    """
    size, out_size = x.shape, model_output.shape
    if out_size != size and (
        out_size[1:] != size[1:] or len(model_output) not in (len(x), 2 * len(x))
    ):
        expected = f"shape {list(size)} (or twice the batch, for both halves of guidance)"
        checks.fail("model_output", expected, list(out_size))
    if not isinstance(table, list):
        if table.shape[-1:] != (len(COLUMNS),) or table.dtype != torch.float64:
            got = f"{table.dtype} {list(table.shape)}"
            checks.fail("table", f"float64 [N, {len(COLUMNS)}]", got)
        if isinstance(step, int) and table.device.type != "cpu":
            checks.fail("table", "a table on the host for an int step", table.device)
    if isinstance(step, int):
        if not 0 <= step < len(table):
            checks.fail("step", f"an index in [0, {len(table)})", step)
        if not torch.compiler.is_compiling():
            row = table[step] if isinstance(table, list) else table[step].tolist()
            return _step(x, model_output, row, step, noise, y, h1, h2, model_input, peak, scratch)
        step = torch.full((1,), step, dtype=torch.int64)
    if isinstance(table, list):
        table = torch.tensor(table, dtype=torch.float64, device=x.device)
    _OP(x, model_output, table, step, noise, y, h1, h2, model_input, peak)
    return None


def reference(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None,
    y: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    model_input: Tensor | None,
    peak: Tensor | None,
) -> None:
    """The same step with the row picked on the device: coefficients stay tensors."""
    row = table.index_select(0, step)[0].to(x.dtype).unbind()
    _step(x, model_output, row, step, noise, y, h1, h2, model_input, peak, None)


def _step(
    x: Tensor,
    model_output: Tensor,
    row: Row,
    step: int | Tensor,
    noise: Tensor | None,
    y: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    model_input: Tensor | None,
    peak: Tensor | None,
    scratch: Sequence[Tensor] | None,
) -> None:
    a, b, clip, c_x, c_0, c_1, c_2, c_y, c_m, s, d_x, d_0, d_1, d_2, d_y, g, rescale = row
    on_host = isinstance(step, int)
    accumulate: Callable[..., None] = _accumulate if on_host else _accumulate_on_device
    if scratch is None:
        scratch = x.new_empty((3, *x.shape)).unbind()
    m_buffer, x0, y_next = scratch

    m = model_output
    if m.shape != x.shape:
        m = _guided(model_output, x, g, rescale, m_buffer)
    if peak is not None:
        largest = torch.amax(torch.abs(m.to(x.dtype), out=x0))
        if isinstance(step, int):
            peak[step].copy_(largest)
        else:
            peak.index_copy_(0, step, largest[None])

    if not on_host or c_0 or d_0 or h1 is not None:
        accumulate(x0, ("x", a, x), ("model_output", b, m))
        if isinstance(clip, Tensor):
            torch.clamp(x0, -clip, clip, out=x0)
        elif clip != math.inf:
            x0.clamp_(-clip, clip)

    if y is not None:
        accumulate(
            y_next, ("x", d_x, x), ("x0", d_0, x0), ("h1", d_1, h1), ("h2", d_2, h2), ("y", d_y, y)
        )
    # x' takes the place of x, so the term that reads x comes first.
    accumulate(
        x,
        *(("x", c_x, x), ("x0", c_0, x0), ("h1", c_1, h1), ("h2", c_2, h2)),
        *(("y", c_y, y), ("model_output", c_m, m), ("noise", s, noise)),
    )

    if y is not None:
        y.copy_(y_next)
    if h1 is not None:
        if h2 is not None:
            h2.copy_(h1)
        h1.copy_(x0)
    if model_input is not None:
        for half in model_input.split(len(x)):
            half.copy_(x)


def _guided(
    model_output: Tensor, x: Tensor, g: float | Tensor, rescale: float | Tensor, out: Tensor
) -> Tensor:
    """u + g * (c - u), in ``out``."""
    uncond, cond = model_output.to(x.dtype).chunk(2)
    torch.lerp(uncond, cond, g, out=out)
    if isinstance(rescale, Tensor) or rescale:
        dims = tuple(range(1, x.dim()))
        ratio = cond.std(dims, keepdim=True) / out.std(dims, keepdim=True)
        factor = 1 + rescale * (ratio - 1)
        if isinstance(rescale, Tensor):
            factor = torch.where(rescale == 0, 1.0, factor)  # a constant image has ratio 0 / 0
        out.mul_(factor)
    return out


def _accumulate(out: Tensor, *terms: tuple[str, float, Tensor | None]) -> None:
    """out = sum of coefficient * tensor. ``out`` itself may stand in the first term only."""
    empty = True
    for name, coefficient, value in terms:
        if coefficient == 0:
            continue
        if value is None:
            checks.fail(name, "a tensor, because this row of the table reads it", None)
        if empty:
            torch.mul(value, coefficient, out=out)
            empty = False
        else:
            out.add_(value, alpha=coefficient)
    if empty:
        out.zero_()


def _accumulate_on_device(out: Tensor, *terms: tuple[str, Tensor, Tensor | None]) -> None:
    """The same with coefficients that the host must not read: a zero hides its term.

    A tensor that is None is a promise of the caller's that no row reads it.
    """
    products = [
        torch.where(coefficient == 0, 0.0, coefficient * value.to(out.dtype))
        for _, coefficient, value in terms
        if value is not None
    ]
    out.copy_(products[0])
    for product in products[1:]:
        out.add_(product)


_OP = Op(
    "sampler_step",
    "(Tensor(a!) x, Tensor model_output, Tensor table, Tensor step, Tensor? noise, Tensor(b!)? y,"
    " Tensor(c!)? h1, Tensor(d!)? h2, Tensor(e!)? model_input, Tensor(f!)? peak) -> ()",
    reference,
    lambda *_: None,
)
