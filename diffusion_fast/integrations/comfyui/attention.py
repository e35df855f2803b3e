"""Attention through ``ModelPatcher.set_model_attn1_replace`` and ``set_model_attn2_replace``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ... import ops

Place = tuple[
    str, int
]  # of a block, as ComfyUI names it: ("input", 4), ("middle", 0), ("output", 7)


def patch_attention(patcher: Any, unet: nn.Module) -> list[str]:
    """Replace self- and cross-attention of every transformer.

    Returns:
        What was left alone because another node has replaced it already.
    """
    taken = []
    options = patcher.model_options.get("transformer_options", {})
    for name, replace in (
        ("attn1", patcher.set_model_attn1_replace),
        ("attn2", patcher.set_model_attn2_replace),
    ):
        replaced = options.get("patches_replace", {}).get(name, {})
        others = {key[:2] for key in replaced}
        for block in transformer_blocks(unet):
            if block in others:
                taken.append(f"{name} of {block[0]} block {block[1]}")
            else:
                replace(attend, *block)
    return taken


def transformer_blocks(unet: Any) -> Iterator[Place]:
    """Where a U-Net in ComfyUI's (that is CompVis's) layout has transformers."""
    for name, blocks in (("input", unet.input_blocks), ("output", unet.output_blocks)):
        for i, block in enumerate(blocks):
            if _attends(block):
                yield name, i
    if _attends(unet.middle_block):
        yield "middle", 0


def _attends(block: nn.Module) -> bool:
    return any(hasattr(module, "transformer_blocks") for module in block.modules())


def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
    """What stands in for attention between the projections, all [B, S, H * D]."""
    heads = extra_options["n_heads"]
    # HyperTile tiles the queries alone: keys of another batch are read in theirs.
    q, k, v = (x.reshape(len(q), -1, heads, x.shape[2] // heads) for x in (q, k, v))  # [B, S, H, D]
    return ops.attention(q, k, v).flatten(2)
