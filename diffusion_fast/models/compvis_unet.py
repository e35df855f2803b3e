"""The U-Net of a CompVis (LDM) checkpoint: its config from shapes, and its parameters' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..files import CheckpointError
from .config import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]

HEADS = 8  # of SD 1.x
HEAD_DIM = 64  # of SD 2.x and SDXL
TIME_ID_DIM = 256  # sinusoids per size of SDXL

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet_name(name: str, config: UNetConfig) -> str:
    """The name in a CompVis checkpoint, without its prefix, of a parameter of our U-Net.

    There the blocks of all levels stand in one list: conv_in, then for each level its residual
    blocks and the downsampling; on the way up the upsampling belongs to the last residual block.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    way, level, part, i, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if part == "resnets":
        stem, _, kind = rest.rpartition(".")
        rest = f"{_RESNET.get(stem, stem)}.{kind}"
    slot = 1 if part == "attentions" else 0
    if way is None:
        return f"middle_block.{2 * i + slot}.{rest}"
    layers = config.per_level("layers_per_block")
    if way == "down":
        block = 1 + sum(layers[:level]) + level
        if part == "downsamplers":
            return f"input_blocks.{block + layers[level]}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{block + i}.{slot}.{rest}"
    upwards = layers[::-1]
    block = sum(upwards[:level]) + level
    if part == "upsamplers":
        attends = config.up_block_types[level] == "CrossAttnUpBlock2D"
        return f"output_blocks.{block + upwards[level]}.{1 + attends}.{rest}"
    return f"output_blocks.{block + i}.{slot}.{rest}"


def unet_config(shapes: Shapes, **fixed: Any) -> UNetConfig:
    """The config of a CompVis U-Net.

    The number of heads isn't in the shapes: SD 1.x, known by its projections being convolutions,
    has 8 everywhere, the others have heads of 64 channels.

    Args:
        shapes: shapes of the U-Net's tensors by name, without prefix.
        fixed: fields of the config that shapes can't tell.

    Raises:
        KeyError: a tensor that every U-Net has is missing.
        ValueError: levels that this model can't have.
    """
    levels = [_Level()]
    for i in range(1, 1 + max(_numbers(shapes, "input_blocks"))):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append(_Level())
            continue
        levels[-1].width = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
        levels[-1].layers += 1
        if f"input_blocks.{i}.1.proj_in.weight" in shapes:
            inner = _numbers(shapes, f"input_blocks.{i}.1.transformer_blocks")
            levels[-1].transformers = 1 + max(inner)
    if "out_channels" not in fixed:
        fixed["out_channels"] = shapes["out.2.weight"][0]
    names = "input_blocks.0.0", "middle_block.1", "label_emb.0.0"
    return _config(shapes, levels, *names, fixed)


def diffusers_unet_config(shapes: Shapes, **fixed: Any) -> UNetConfig:
    """:func:`unet_config` of tensors in diffusers' names; ``out_channels`` is among ``fixed``."""
    levels = []
    for i in range(1 + max(_numbers(shapes, "down_blocks"))):
        level, block = _Level(), f"down_blocks.{i}"
        level.layers = 1 + max(_numbers(shapes, f"{block}.resnets"))
        level.width = shapes[f"{block}.resnets.0.conv1.weight"][0]
        if f"{block}.attentions.0.proj_in.weight" in shapes:
            inner = _numbers(shapes, f"{block}.attentions.0.transformer_blocks")
            level.transformers = 1 + max(inner)
        levels.append(level)
    return _config(
        shapes, levels, "conv_in", "mid_block.attentions.0", "add_embedding.linear_1", fixed
    )


def _config(
    shapes: Shapes, levels: list[_Level], first: str, mid: str, pooled: str, fixed: dict[str, Any]
) -> UNetConfig:
    """The config of some levels.

    Args:
        shapes: shapes of the U-Net's tensors by name.
        levels: what they tell of each level.
        first: name of the first convolution.
        mid: name of the transformer at the bottom.
        pooled: name of the first layer for pooled text.
        fixed: fields of the config that shapes can't tell.
    """
    widths = [level.width for level in levels]
    attention = [level.transformers > 0 for level in levels]
    depths = [max(level.transformers, 1) for level in levels]
    if not attention[-1]:  # of the last level the bottom has attention all the same (the refiner)
        depths[-1] = 1 + max(_numbers(shapes, f"{mid}.transformer_blocks"))
    layers = [level.layers for level in levels]
    linear = len(shapes[f"{mid}.proj_in.weight"]) == 2
    if linear and any(width % HEAD_DIM for width in widths):
        raise CheckpointError(f"expected levels of n * {HEAD_DIM} channels, got {widths}")
    if f"{pooled}.weight" in shapes:
        fixed["addition_embed_type"] = "text_time"
        fixed["addition_time_embed_dim"] = TIME_ID_DIM
        fixed["projection_class_embeddings_input_dim"] = shapes[f"{pooled}.weight"][1]
    if "time_embed.cond_proj.weight" in shapes:
        fixed["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    return UNetConfig(
        in_channels=shapes[f"{first}.weight"][1],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        block_out_channels=tuple(widths),
        layers_per_block=_one_or_all(layers),
        cross_attention_dim=shapes[f"{mid}.transformer_blocks.0.attn2.to_k.weight"][1],
        transformer_layers_per_block=_one_or_all(depths),
        attention_head_dim=tuple(width // HEAD_DIM for width in widths) if linear else HEADS,
        use_linear_projection=linear,
        **fixed,
    )


class _Level:
    width = layers = transformers = 0


def _numbers(shapes: Shapes, name: str) -> list[int]:
    """n of all tensors ``name.n.``...; [0] if there are none."""
    found = (re.match(rf"{re.escape(name)}\.(\d+)\.", tensor) for tensor in shapes)
    return [int(match[1]) for match in found if match] or [0]


def _one_or_all(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)
