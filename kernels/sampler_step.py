"""One row of a sampler's table: guidance, x0, clamp, x', y', history, next model input, one launch.

    m   = u + g (c - u)                            (times a factor per image, when rescaling)
    x0  = clamp(a x + b m, -clip, clip)
    x'  = c_x x + c_0 x0 + c_1 h1 + c_2 h2 + c_3 h3 + c_y y + c_m m + c_u u + s z
    y'  = d_x x + d_0 x0 + d_1 h1 + d_2 h2 + d_3 h3 + d_y y + d_u u
    h3, h2, h1 <- h2, h1, e_x x + e_0 x0 + e_m m + e_u u   (they stay where all four are 0)
    model input <- x' (both halves);   peak[step] <- max |m|

The row comes by a counter on the device, one for all images or one for each, or as launch arguments
for a step known on the host; z from memory, from row ``step`` of a table of noise, or from Philox,
``step`` added to its offset. Image i's outputs c and u lie at ``cond[i]`` and ``uncond[i]``, where
those are given; one output for both is m itself.
The state (x, y, h1, h2, z) is dense, contiguous or channels_last, and walked as memory lies; the
model's output and input have dtypes and strides of their own. A term of coefficient 0 counts as 0
whatever its tensor holds. Guidance rescale first needs a standard deviation per image:
``_deviations``.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, philox, statistics
from .columns import COLUMNS as NAMES

(
    A, B, CLIP, C_X, C_0, C_1, C_2, C_3, C_Y, C_M, C_U, S_Z, D_X, D_0, D_1, D_2, D_3, D_Y, D_U,
    E_X, E_0, E_M, E_U, GUIDANCE, RESCALE
) = (tl.constexpr(i) for i in range(len(NAMES)))  # fmt: skip
BLOCK = 1024
PARTS = 16  # of an image, whose statistics are made apart


@triton.jit
def _term(coefficient, value):
    return tl.where(coefficient == 0.0, 0.0, coefficient * value)


@triton.jit
def _guided(
    m_ptr,
    strides,
    cond_ptr,
    uncond_ptr,
    image,
    batch,
    c,
    s,
    valid,
    guidance,
    DTYPE: tl.constexpr,
    HALVES: tl.constexpr,
):
    """(guided, conditional, unconditional) output at channel c and place s of an image."""
    place = c.to(tl.int64) * strides[1] + s.to(tl.int64) * strides[2]
    if cond_ptr is not None:
        row, other = tl.load(cond_ptr + image), tl.load(uncond_ptr + image)
        cond = tl.load(m_ptr + row * strides[0] + place, mask=valid, other=0.0).to(DTYPE)
        first = tl.load(m_ptr + other * strides[0] + place, mask=valid, other=0.0).to(DTYPE)
        m = tl.where(row == other, cond, first + guidance * (cond - first))
        return m, cond, first
    first = tl.load(m_ptr + image * strides[0] + place, mask=valid, other=0.0).to(DTYPE)
    if HALVES == 2:
        m_ptr += (image + batch) * strides[0]
        cond = tl.load(m_ptr + place, mask=valid, other=0.0).to(DTYPE)
        m = first + guidance * (cond - first)
    else:
        m, cond = first, first
    return m, cond, first


@triton.jit
def _row(table_ptr, step_ptr, host, COLUMNS: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr):
    """Coefficient i: of the row that the device's counter names, or of the launch's arguments."""
    if step_ptr is None:
        coefficient = tl.full((), host, DTYPE)
    else:
        coefficient = tl.load(table_ptr + tl.load(step_ptr) * COLUMNS + i).to(DTYPE)
    return coefficient


@triton.jit
def _deviations(
    parts_ptr,
    output,
    table_ptr,
    step_ptr,
    guidance: tl.float64,
    batch,
    channels,
    space,
    part_size,
    EACH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count, mean, squared deviations of guided and conditional output, [B, PARTS, 2, 3]."""
    # Triton 3.6 can't hand a tuple with a None in it on to a function.
    m_ptr, strides, cond_ptr, uncond_ptr = output
    image = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    if EACH and step_ptr is not None:
        step_ptr += image
    g = _row(table_ptr, step_ptr, guidance, COLUMNS, GUIDANCE, DTYPE)
    count = tl.zeros((), DTYPE)
    mean = tl.zeros((), DTYPE)
    m2 = tl.zeros((), DTYPE)
    cond_mean = tl.zeros((), DTYPE)
    cond_m2 = tl.zeros((), DTYPE)
    last = tl.minimum((part + 1) * part_size, channels * space)
    for start in range(part * part_size, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        valid = index < last
        c, s = index // space, index % space
        m, cond, _ = _guided(
            m_ptr, strides, cond_ptr, uncond_ptr, image, batch, c, s, valid, g, DTYPE, 2
        )
        n = tl.full((), tl.minimum(last - start, BLOCK), DTYPE)
        share = n / (count + n)
        tile_mean = tl.sum(m, 0) / n
        deviation = tl.where(valid, m - tile_mean, 0.0)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tl.sum(deviation * deviation, 0) + delta * delta * (count * share)
        tile_mean = tl.sum(cond, 0) / n
        deviation = tl.where(valid, cond - tile_mean, 0.0)
        delta = tile_mean - cond_mean
        cond_mean += delta * share
        cond_m2 += tl.sum(deviation * deviation, 0) + delta * delta * (count * share)
        count += n
    parts_ptr += (image * PARTS + part) * 6
    tl.store(parts_ptr, count)
    tl.store(parts_ptr + 1, mean)
    tl.store(parts_ptr + 2, m2)
    tl.store(parts_ptr + 3, count)
    tl.store(parts_ptr + 4, cond_mean)
    tl.store(parts_ptr + 5, cond_m2)


@triton.jit
def _factor(parts_ptr, image, rescale, PARTS: tl.constexpr):
    """1 + rescale (std(cond) / std(m) - 1) for an image; 1 where nothing is rescaled."""
    part = parts_ptr + (image * PARTS + tl.arange(0, PARTS)) * 6
    _, m2, _ = statistics.merge(tl.load(part), tl.load(part + 1), tl.load(part + 2), 0)
    _, cond_m2, _ = statistics.merge(tl.load(part + 3), tl.load(part + 4), tl.load(part + 5), 0)
    # A constant image has no deviation to bring anywhere, and its ratio would be 0 / 0.
    ratio = tl.sqrt(cond_m2) / tl.sqrt(m2)
    return tl.where((rescale == 0.0) | (m2 == 0.0), 1.0, 1.0 + rescale * (ratio - 1.0))


@triton.jit
def _write_peak(peak_ptr, step, m, valid, DTYPE: tl.constexpr):
    """Maximum of |m| as integers, whose order is that of the floats and puts NaN above infinity."""
    if DTYPE.is_fp64():
        pattern = m.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        pattern = m.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(peak_ptr + step, tl.max(tl.where(valid, pattern, 0), 0))


@triton.jit(do_not_specialize=["host_step", "seed", "offset"])
def _sampler_step(
    state,
    output,
    input_ptr,
    input_strides,
    peak_ptr,
    parts_ptr,
    noise_stride,
    stream,
    seed: tl.int64,
    offset: tl.int64,
    table_ptr,
    step_ptr,
    host_step,
    a: tl.float64,
    b: tl.float64,
    clip: tl.float64,
    c_x: tl.float64,
    c_0: tl.float64,
    c_1: tl.float64,
    c_2: tl.float64,
    c_3: tl.float64,
    c_y: tl.float64,
    c_m: tl.float64,
    c_u: tl.float64,
    s_z: tl.float64,
    d_x: tl.float64,
    d_0: tl.float64,
    d_1: tl.float64,
    d_2: tl.float64,
    d_3: tl.float64,
    d_y: tl.float64,
    d_u: tl.float64,
    e_x: tl.float64,
    e_0: tl.float64,
    e_m: tl.float64,
    e_u: tl.float64,
    guidance: tl.float64,
    rescale: tl.float64,
    batch,
    channels,
    space,
    chunks,
    LAST: tl.constexpr,  # the state is channels_last
    HALVES: tl.constexpr,
    INPUT_HALVES: tl.constexpr,
    NOISE: tl.constexpr,  # "none", "memory" or "philox"
    UNCONDITIONAL: tl.constexpr,  # a row may read u
    STATE_ON_DEVICE: tl.constexpr,
    EACH: tl.constexpr,  # image has a step of its own
    STREAMS: tl.constexpr,  # image has a Philox stream of its own
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x_ptr, y_ptr, h1_ptr, h2_ptr, h3_ptr, z_ptr = state
    m_ptr, strides, cond_ptr, uncond_ptr = output
    image = (tl.program_id(0) // chunks).to(tl.int64)
    size = channels * space
    index = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    valid = index < size
    if LAST:
        c, s = index % channels, index // channels
    else:
        c, s = index // space, index % space
    here = image * size + index
    if EACH and step_ptr is not None:
        step_ptr += image
    if step_ptr is None:
        step = tl.full((), host_step, tl.int64)
    else:
        step = tl.load(step_ptr)

    g = _row(table_ptr, step_ptr, guidance, COLUMNS, GUIDANCE, DTYPE)
    m, _, u = _guided(
        m_ptr, strides, cond_ptr, uncond_ptr, image, batch, c, s, valid, g, DTYPE, HALVES
    )
    if parts_ptr is not None:
        rescale = _row(table_ptr, step_ptr, rescale, COLUMNS, RESCALE, DTYPE)
        m = m * _factor(parts_ptr, image, rescale, PARTS)
    if peak_ptr is not None:
        _write_peak(peak_ptr, step, m, valid, DTYPE)

    x = tl.load(x_ptr + here, mask=valid, other=0.0)
    if h1_ptr is not None:
        h1 = tl.load(h1_ptr + here, mask=valid, other=0.0)
    if h2_ptr is not None:
        h2 = tl.load(h2_ptr + here, mask=valid, other=0.0)
    if h3_ptr is not None:
        h3 = tl.load(h3_ptr + here, mask=valid, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + here, mask=valid, other=0.0)
    # Below, an element may be written by another thread than the one that has read it.
    tl.debug_barrier()

    x0 = _term(_row(table_ptr, step_ptr, a, COLUMNS, A, DTYPE), x)
    x0 += _term(_row(table_ptr, step_ptr, b, COLUMNS, B, DTYPE), m)
    # Comparisons with NaN are false: it passes through, as in torch.clamp.
    limit = _row(table_ptr, step_ptr, clip, COLUMNS, CLIP, DTYPE)
    x0 = tl.where(x0 > limit, limit, x0)
    x0 = tl.where(x0 < -limit, -limit, x0)

    x_next = _term(_row(table_ptr, step_ptr, c_x, COLUMNS, C_X, DTYPE), x)
    x_next += _term(_row(table_ptr, step_ptr, c_0, COLUMNS, C_0, DTYPE), x0)
    y_next = _term(_row(table_ptr, step_ptr, d_x, COLUMNS, D_X, DTYPE), x)
    y_next += _term(_row(table_ptr, step_ptr, d_0, COLUMNS, D_0, DTYPE), x0)
    if h1_ptr is not None:
        x_next += _term(_row(table_ptr, step_ptr, c_1, COLUMNS, C_1, DTYPE), h1)
        y_next += _term(_row(table_ptr, step_ptr, d_1, COLUMNS, D_1, DTYPE), h1)
    if h2_ptr is not None:
        x_next += _term(_row(table_ptr, step_ptr, c_2, COLUMNS, C_2, DTYPE), h2)
        y_next += _term(_row(table_ptr, step_ptr, d_2, COLUMNS, D_2, DTYPE), h2)
    if h3_ptr is not None:
        x_next += _term(_row(table_ptr, step_ptr, c_3, COLUMNS, C_3, DTYPE), h3)
        y_next += _term(_row(table_ptr, step_ptr, d_3, COLUMNS, D_3, DTYPE), h3)
    if UNCONDITIONAL:
        x_next += _term(_row(table_ptr, step_ptr, c_u, COLUMNS, C_U, DTYPE), u)
        y_next += _term(_row(table_ptr, step_ptr, d_u, COLUMNS, D_U, DTYPE), u)
    if h1_ptr is not None:
        of_x = _row(table_ptr, step_ptr, e_x, COLUMNS, E_X, DTYPE)
        of_x0 = _row(table_ptr, step_ptr, e_0, COLUMNS, E_0, DTYPE)
        of_m = _row(table_ptr, step_ptr, e_m, COLUMNS, E_M, DTYPE)
        stays = (of_x == 0.0) & (of_x0 == 0.0) & (of_m == 0.0)
        newest = _term(of_x, x) + _term(of_x0, x0) + _term(of_m, m)
        if UNCONDITIONAL:
            of_u = _row(table_ptr, step_ptr, e_u, COLUMNS, E_U, DTYPE)
            stays = stays & (of_u == 0.0)
            newest += _term(of_u, u)
        moves = valid & (stays == 0)
        if h3_ptr is not None:
            tl.store(h3_ptr + here, h2, mask=moves)
        if h2_ptr is not None:
            tl.store(h2_ptr + here, h1, mask=moves)
        tl.store(h1_ptr + here, newest, mask=moves)
    if y_ptr is not None:
        x_next += _term(_row(table_ptr, step_ptr, c_y, COLUMNS, C_Y, DTYPE), y)
        y_next += _term(_row(table_ptr, step_ptr, d_y, COLUMNS, D_Y, DTYPE), y)
        tl.store(y_ptr + here, y_next, mask=valid)
    x_next += _term(_row(table_ptr, step_ptr, c_m, COLUMNS, C_M, DTYPE), m)
    amount = _row(table_ptr, step_ptr, s_z, COLUMNS, S_Z, DTYPE)
    if NOISE == "memory":
        z_ptr += step * noise_stride
        z = tl.load(z_ptr + here, mask=valid & ((amount == 0.0) == 0), other=0.0).to(DTYPE)
        x_next += _term(amount, z)
    elif NOISE == "philox":
        element = image * size + c * space + s
        if STREAMS:
            stream += 2 * image
            element -= image * size
        seed, offset = philox.stream(stream, seed, offset, STATE_ON_DEVICE)
        z = philox.normal(seed, offset + step, element)
        x_next += _term(amount, z.to(DTYPE))
    tl.store(x_ptr + here, x_next, mask=valid)

    if input_ptr is not None:
        place = c.to(tl.int64) * input_strides[1] + s.to(tl.int64) * input_strides[2]
        place += input_ptr + image * input_strides[0]
        tl.store(place, x_next, mask=valid)
        if INPUT_HALVES == 2:
            tl.store(place + batch * input_strides[0], x_next, mask=valid)


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None = None,
    y: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    model_input: Tensor | None = None,
    peak: Tensor | None = None,
    stream: Tensor | None = None,
    rescale: bool = True,
    unconditional: bool = True,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    row: Sequence[float] = (),
    index: int = 0,
    scratch: Sequence[Tensor] = (),
) -> None:
    """In place, by rows ``step`` of ``table``, both on the device, or by ``row``, floats."""
    if not x.numel():
        return
    batch, channels, device = x.shape[0], x.shape[1] if x.dim() > 1 else 1, x.device
    space = x.numel() // (batch * channels)
    on_host = table is None
    numbers = dict(zip(NAMES, row if on_host else (0.0,) * len(NAMES), strict=True))
    dtype = {"DTYPE": launch.accumulator(x.dtype), "COLUMNS": len(NAMES), "PARTS": PARTS}
    dtype["EACH"] = cond is not None
    pick = table, step
    reads = numbers["c_u"] or numbers["d_u"] or numbers["e_u"]
    if launch.image_strides(_image(model_output)) is None:
        model_output = model_output.contiguous()
    output = model_output, launch.image_strides(_image(model_output)), cond, uncond
    halves = 2 if cond is not None else model_output.shape[0] // batch

    parts = None
    if halves == 2 and (numbers["rescale"] != 0 if on_host else rescale):
        parts = torch.empty(batch, PARTS, 2, 3, dtype=x.dtype, device=device)
        part_size = triton.cdiv(triton.cdiv(channels * space, PARTS), BLOCK) * BLOCK
        grid = (batch * PARTS,)
        sizes = batch, channels, space, part_size
        options = {**dtype, "BLOCK": BLOCK, "device": device}
        guidance = numbers["guidance"]
        launch.launch(_deviations, grid, parts, output, *pick, guidance, *sizes, **options)

    noise_stride = noise.stride(0) if noise is not None and noise.dim() > x.dim() else 0
    streams = stream is not None and stream.dim() > 1
    if streams:
        source = stream, 0, 0, True
    else:
        source = (None, 0, 0, False) if stream is None else philox.arguments(stream)
    kind = "philox" if stream is not None else "none" if noise is None else "memory"
    strides = (0, 0, 0) if model_input is None else launch.image_strides(_image(model_input))
    # The integers of a float's bits: an atomic maximum of floats would lose NaN.
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = None if peak is None else peak.view(integer)
    chunks = triton.cdiv(channels * space, BLOCK)
    launch.launch(
        _sampler_step,
        (batch * chunks,),
        (x, y, h1, h2, h3, noise),
        output,
        model_input,
        strides,
        bits,
        parts,
        noise_stride,
        *source[:3],
        *pick,
        index,
        *numbers.values(),
        batch,
        channels,
        space,
        chunks,
        device=device,
        LAST=not x.is_contiguous(),
        HALVES=halves,
        INPUT_HALVES=1 if model_input is None else model_input.shape[0] // batch,
        NOISE=kind,
        UNCONDITIONAL=bool(reads) if on_host else unconditional,
        STATE_ON_DEVICE=source[3],
        STREAMS=streams,
        BLOCK=BLOCK,
        **dtype,
    )


def _image(value: Tensor) -> Tensor:
    """[B] beside [B, C, ...]."""
    return value if value.dim() > 1 else value[:, None]
