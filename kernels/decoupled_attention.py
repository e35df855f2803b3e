"""Attention to several contexts in one pass, each with a softmax of its own (arXiv:2308.06721).

    o = softmax(scale q K_0^T) V_0 + sum_i w_i softmax(scale q K_i^T) V_i

The keys of all contexts lie one behind the other. A program takes a tile of queries of one head: it
reads them once, walks over each context's keys in blocks (the softmax online, Milakov and
Gimelshein 2018, arXiv:1805.02867), adds what it found, and writes the tile once.

Layout: [B, S, H, D], any strides but the last, which is 1; keys and values of one image may serve
all. Scores, weights and sums are of float32 (float64 for float64); float32 products in three tf32
parts, which leaves them exact to about float32's rounding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BYTES = 16  # that a thread reads at once, at most


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    column,
    count,
    scale,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """The sum of exp(score) v over ``count`` keys, and that of exp(score): [M, K] and [M].

    Both are as if a row's largest score were 0. ``scale`` is that of scores for powers of two.
    """
    most = tl.full([M], float("-inf"), DTYPE)
    norm = tl.zeros([M], DTYPE)
    out = tl.zeros([M, K], DTYPE)
    inside = column < DIM
    for start in range(0, count, N):
        key = start + tl.arange(0, N)
        seen = key < count
        if WIDE:
            key = key.to(tl.int64)
        k_place = (key * k_stride * UNIT)[None, :] + column[:, None]
        k = tl.load(k_ptr + k_place, mask=inside[:, None] & seen[None, :], other=0.0)
        v_place = (key * v_stride * UNIT)[:, None] + column[None, :]
        v = tl.load(v_ptr + v_place, mask=seen[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            k, v = k.to(DTYPE), v.to(DTYPE)
        scores = tl.dot(q, k, input_precision="tf32x3", out_dtype=DTYPE) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        fade = tl.exp2(most - larger)
        weight = tl.exp2(scores - larger[:, None])
        norm = norm * fade + tl.sum(weight, 1)
        out = out * fade[:, None]
        out = tl.dot(weight.to(v.dtype), v, out, input_precision="tf32x3", out_dtype=DTYPE)
        most = larger
    return out, norm


@triton.jit
def _of_part(counts, part):
    """counts[part]. A loop for each part, unrolled, would spill registers where they are many."""
    found = counts[0] + 0 * part  # a value of the program's also where the number is a constant
    for i in tl.static_range(1, len(counts)):
        found = tl.where(part == i, counts[i], found)
    return found


# Numbers that decide nothing about the program: neither whether addresses are aligned nor its form.
@triton.jit(do_not_specialize=["queries", "heads"])
def _decoupled_attention(
    out_ptr,
    out_strides,
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    weights_ptr,
    weights_strides,
    lengths_ptr,
    counts,
    queries,
    heads,
    scale: tl.float64,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tiles = tl.cdiv(queries, M)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    batch = tl.program_id(0) // heads // tiles
    row = tile * M + tl.arange(0, M)
    if WIDE:
        head, batch, row = head.to(tl.int64), batch.to(tl.int64), row.to(tl.int64)
    column = tl.arange(0, K)
    valid = (row < queries)[:, None] & (column < DIM)[None, :]
    place = batch * q_strides[0] + head * q_strides[2] + row * q_strides[1]
    q = tl.load(q_ptr + (place * UNIT)[:, None] + column[None, :], mask=valid, other=0.0)
    if WIDEN:
        q = q.to(DTYPE)
    k_ptr += (batch * k_strides[0] + head * k_strides[2]) * UNIT
    v_ptr += (batch * v_strides[0] + head * v_strides[2]) * UNIT
    weights_ptr += batch * weights_strides[0]

    of_powers = tl.full((), scale, DTYPE)
    total = tl.zeros([M, K], DTYPE)
    for part in range(len(counts)):
        count = _of_part(counts, part)
        seen = count
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + batch).to(tl.int32)
            seen = tl.where(part == 0, tl.minimum(length, count), count)
        found, norm = _attend(
            q, k_ptr, v_ptr, k_strides[1], v_strides[1], column, seen, of_powers, DTYPE, WIDE,
            WIDEN, DIM, UNIT, M, N, K,
        )  # fmt: skip
        at = weights_ptr + (part - 1) * weights_strides[1] + row * weights_strides[2]
        weight = tl.load(at, mask=(row < queries) & (part > 0), other=1.0).to(DTYPE)
        total += found * (weight / norm)[:, None]
        if WIDE:
            count = count.to(tl.int64)
        k_ptr += count * k_strides[1] * UNIT
        v_ptr += count * v_strides[1] * UNIT
    place = batch * out_strides[0] + head * out_strides[2] + row * out_strides[1]
    tl.store(out_ptr + (place * UNIT)[:, None] + column[None, :], total, mask=valid)


class Config(NamedTuple):
    """Queries of a tile, keys of a block at most, and what computes it."""

    m: int
    n: int
    warps: int
    stages: int


def config(dtype: torch.dtype, width: int) -> Config:
    """By the head's width, a power of two.

    A consumer GPU has 99 KB of shared memory: for the queries, and for two blocks of keys and
    values, so that one is loaded while the other is multiplied. In registers lie two sums of the
    queries' size and a block of scores, which in half precision spill on neither sm_80 nor sm_90.
    Short blocks suit few keys: 80 or 96 are computed of a text's 77, 16 or 32 of an image's 4.
    """
    if dtype == torch.float64:
        return Config(16, 16, 4 if width <= 128 else 8, 1)
    if dtype == torch.float32:  # a product's three parts take registers too
        return Config(32, 32, 4, 2) if width <= 64 else Config(16, 16, 4 if width <= 128 else 8, 2)
    # 64 queries are the least that Hopper multiplies by a group of warps.
    if width <= 64:
        return Config(128, 32, 8, 2)
    return Config(64, 32 if width <= 128 else 16, 8, 2)


def decoupled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[int],
    weights: Tensor,
    scale: float,
    key_lengths: Tensor | None,
) -> Tensor:
    """[B, Sq, H, D], contiguous."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    q, k, v = (value if value.stride(-1) == 1 else value.contiguous() for value in (q, k, v))
    batch, queries, heads, dim = q.shape
    k, v = k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    weights = weights.expand(batch, -1, queries)
    # Strides are counted in units of as many elements as they all are multiples of, so that the
    # compiler knows: a head's 40 elements begin at multiples of 8.
    strides = [value.stride()[:3] for value in (out, q, k, v)]
    unit = math.gcd(BYTES // q.element_size(), *(n for every in strides for n in every))
    of_out, of_q, of_k, of_v = (tuple(n // unit for n in every) for every in strides)
    width = max(launch.power_of_2(dim), 16)
    chosen = config(q.dtype, width)
    launch.launch(
        _decoupled_attention,
        (triton.cdiv(queries, chosen.m) * heads * batch,),
        out,
        of_out,
        q,
        of_q,
        k,
        of_k,
        v,
        of_v,
        weights,
        weights.stride(),
        None if key_lengths is None else key_lengths.contiguous(),
        tuple(parts),
        queries,
        heads,
        scale * math.log2(math.e),
        DTYPE=launch.accumulator(q.dtype),
        WIDE=launch.wide(q, k, v, out, weights),
        WIDEN=launch.INTERPRETED,  # whose products of bfloat16 are those of its bit patterns
        DIM=dim,
        UNIT=unit,
        M=chosen.m,
        N=chosen.n,
        K=width,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        device=q.device,
    )
    return out
