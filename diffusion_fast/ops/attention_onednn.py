"""Attention on a CPU as oneDNN's products: for long sequences faster than PyTorch's own.

PyTorch's flash attention calls a BLAS on small tiles. Here a block of queries sees all keys of its
head at once, and the block's scores stay in the cache between the two products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import onednn

# Queries, and multiply-adds of a product of one head, from which this is the faster way.
LONG, LARGE = 256, 2**23
_SCORES = 2**20  # of a block: 4 MB
# Channels that are summed at once: oneDNN adds up a whole row in float32, other BLASes in pieces of
# this size, which are twice as exact at an autoencoder's 512 channels.
_SUMMED = 256


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> list[str]:
    """Why this call is not for oneDNN; empty if it is."""
    if q.dtype != torch.float32:
        return [f"{q.dtype}, and scores must not be rounded to less than float32"]
    if q.shape[1] < LONG or q.shape[1] * k.shape[1] * q.shape[3] < LARGE:
        return [f"fewer than {LONG} queries, or {LARGE:,} multiply-adds per head"]
    if bias is not None or save_lse:
        return ["it adds no bias and keeps no log-sum-exp"]
    return onednn.takes(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D], and no log-sum-exp."""
    keys = k.shape[1]
    lengths = [keys] * len(q) if key_lengths is None else key_lengths.tolist()
    rows = max(_SCORES // keys, 1)
    # By head: q [B, H, Sq, D], k [B, H, Sk, D], v [B, H, D, Sk], which is a product's weight.
    q = (q * scale).transpose(1, 2).contiguous()
    k, v = k.transpose(1, 2).contiguous(), v.permute(0, 2, 3, 1).contiguous()
    k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
    out = q.new_empty(len(q), q.shape[2], q.shape[1], q.shape[3])
    for item, length in enumerate(lengths):
        for head in range(q.shape[1]):
            seen, values = k[item, head, :length], v[item, head, :, :length].contiguous()
            blocks = q[item, head].split(rows), out[item, :, head].split(rows)
            for block, result in zip(*blocks, strict=True):
                weights = torch.softmax(_scores(block, seen), dim=-1)
                result.copy_(onednn.linear(weights, values, None))
    return out, out.new_empty(0)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T, from [N, D] and [M, D]."""
    if q.shape[1] <= _SUMMED:
        return onednn.linear(q, k, None)
    pieces = zip(q.split(_SUMMED, 1), k.split(_SUMMED, 1), strict=True)
    first, *others = ((one.contiguous(), other.contiguous()) for one, other in pieces)
    scores = onednn.linear(*first, None)
    for one, other in others:
        scores = onednn.linear(one, other, None, "add", scores)
    return scores
