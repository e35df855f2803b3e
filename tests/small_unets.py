"""Configs of small U-Nets: of every kind, and any that hypothesis draws."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffusion_fast.models import UNetConfig

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}
# The others are what they change of the small one.
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
ATTENTION_IN_THE_MIDDLE_ONLY: dict[str, Any] = {
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT_TIME: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
LIKE_SDXL: dict[str, Any] = {
    **THREE_LEVELS,
    **TEXT_TIME,
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 6),
    "use_linear_projection": True,
}


def small_config(**changes: Any) -> UNetConfig:
    return UNetConfig(**{**SMALL, **changes})


@st.composite
def configs(draw: st.DrawFn, *additions: dict[str, Any]) -> UNetConfig:
    """Any small U-Net, with one of the additions or none."""
    levels = draw(st.integers(1, 3))

    def per_level(values: list[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(levels))

    return UNetConfig(
        in_channels=draw(st.integers(1, 5)),
        out_channels=draw(st.integers(1, 5)),
        block_out_channels=per_level([8, 16, 24]),
        down_block_types=per_level(["DownBlock2D", "CrossAttnDownBlock2D"]),
        up_block_types=per_level(["UpBlock2D", "CrossAttnUpBlock2D"]),
        layers_per_block=per_level([1, 2, 3]),
        transformer_layers_per_block=per_level([1, 2]),
        attention_head_dim=per_level([1, 2, 4, 8]),
        norm_num_groups=draw(st.sampled_from([1, 2, 4, 8])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        cross_attention_dim=draw(st.integers(1, 20)),
        use_linear_projection=draw(st.booleans()),
        downsample_padding=draw(st.sampled_from([0, 1])),
        flip_sin_to_cos=draw(st.booleans()),
        freq_shift=draw(st.sampled_from([0, 1])),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        **draw(st.sampled_from([{}, *additions])),
    )


def pooled_text(config: UNetConfig, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments that only a model with a ``"text_time"`` embedding takes."""
    if config.addition_embed_type is None:
        return {}
    assert config.projection_class_embeddings_input_dim is not None
    assert config.addition_time_embed_dim is not None
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "text_embeds": torch.randn(batch, width).to(dtype),
        "time_ids": torch.randint(0, 1024, (batch, 6)),
    }
