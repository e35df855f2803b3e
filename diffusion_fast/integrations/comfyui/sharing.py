"""What the prompts and regions that ComfyUI computes in one call have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.unet import UNet2DCondition
from ...models.unet_encoder import TimeProjections


def compared(
    inputs: Sequence[Tensor], chunks: int, pairs: Sequence[tuple[Tensor, Tensor]]
) -> tuple[tuple[list[int], list[int]] | None, list[bool]]:
    """What is equal in a batch, by one question to the device.

    Args:
        inputs: tensors [B, ...].
        chunks: how many parts the batch consists of, of prompts or regions.
        pairs: tensors of the same shape.

    Returns:
        Where parts have the same inputs, the first row of each image among the B rows, and of each
        row the number of its image; None where no two have. And whether each pair is equal.
    """
    batch = len(inputs[0])
    chunks = chunks if batch % chunks == 0 else 1
    each = batch // chunks
    same = torch.ones(chunks, chunks, dtype=torch.bool, device=inputs[0].device)
    for value in inputs:
        parts = value.reshape(chunks, -1)
        same = same & (parts[:, None] == parts).all(2)
    answers = torch.stack([*same.flatten(), *((a == b).all() for a, b in pairs)]).tolist()
    rows = [answers[i * chunks : (i + 1) * chunks] for i in range(chunks)]
    first = [row.index(True) if any(row) else i for i, row in enumerate(rows)]
    kept = sorted(set(first))
    known = answers[chunks * chunks :]
    if len(kept) == chunks:
        return None, known
    firsts = [part * each + j for part in kept for j in range(each)]
    image = [kept.index(part) * each + j for part in first for j in range(each)]
    return (firsts, image), known


def times_of(unet: UNet2DCondition, time: TimeProjections, firsts: Tensor) -> TimeProjections:
    """Times of the batch's rows, and of its images where these have no row for each prompt yet."""
    return [
        [
            one.index_select(0, firsts) if shared else one
            for one, shared in zip(block, of_block, strict=True)
        ]
        for block, of_block in zip(time, unet.shared_blocks(), strict=True)
    ]
