"""The autoencoder of a CompVis (LDM) checkpoint: its config from shapes, its parameters' names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .tensors import Stored
from .vae_config import VAEConfig

_COMPVIS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
        (r"conv_norm_out\.", "norm_out."),
    )
]


_LEVEL = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.")


def in_compvis_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of an autoencoder in diffusers' names, in those of CompVis."""
    levels = 1 + max((int(m[1]) for m in map(_LEVEL.match, tensors) if m), default=0)
    return {_vae_name(name, levels): tensor for name, tensor in tensors.items()}


def vae_name(name: str, config: VAEConfig) -> str:
    """The name in a CompVis checkpoint, without its prefix, of a parameter of our autoencoder."""
    return _vae_name(name, config.num_levels)


def _vae_name(name: str, levels: int) -> str:
    for pattern, new in _COMPVIS:
        name = pattern.sub(new, name)
    # Here the decoder's levels are counted from the finest, there from the first to run.
    last = levels - 1
    return re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{last - int(match[1])}.", name)


def vae_config(
    shapes: Mapping[str, tuple[int, ...]], sample_size: int, scaling_factor: float
) -> VAEConfig:
    """The config of a CompVis autoencoder, from its tensors' shapes; names without prefix.

    Raises:
        KeyError: a tensor that every autoencoder has is missing.
        ValueError: levels that this model can't have.
    """
    blocks = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", n) for n in shapes]
    places = {(int(match[1]), int(match[2])) for match in blocks if match}
    levels = 1 + max((level for level, _ in places), default=0)
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ),
        layers_per_block=1 + max(block for _, block in places),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        sample_size=sample_size,
        scaling_factor=scaling_factor,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
    )
