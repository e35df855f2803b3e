"""Small ControlNets and T2I-Adapters of diffusers with random weights, and ours of the same."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from small_unets import LIKE_SDXL, SMALL
from torch import nn

HINT = (8, 8, 12, 16)  # channels of the hint's layers
_OF_UNETS = ("up_block_types", "out_channels", "sample_size")
WITHOUT_ATTENTION = {
    "down_block_types": ("DownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
}
NETS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"use_linear_projection": True, "attention_head_dim": (1, 2)},
    "sdxl": {n: v for n, v in LIKE_SDXL.items() if n != "layers_per_block"},
    "without attention": WITHOUT_ATTENTION,
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "pooled": {"global_pool_conditions": True},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"channels": (16, 32), "num_res_blocks": 2},
    "grey": {"channels": (16, 32), "in_channels": 1},
    "light": {"channels": (16,), "adapter_type": "light_adapter", "num_res_blocks": 3},
    "xl": {"channels": (16, 32, 48, 48), "adapter_type": "full_adapter_xl", "downscale_factor": 16},
}


def randomized(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter random, those too that training starts from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            fan = value[0].numel() if value.dim() > 1 else 16
            value.copy_(torch.randn(value.shape, generator=generator) * fan**-0.5)
            if "norm" in name and name.endswith("weight"):
                value.add_(1)
    return model.eval().requires_grad_(False)


def controlnet(config: dict[str, Any], seed: int = 0) -> Any:
    """diffusers' ControlNet for a U-Net of a config."""
    shape = {n: v for n, v in config.items() if n not in _OF_UNETS}
    shape = {"conditioning_embedding_out_channels": HINT, **shape}
    return randomized(diffusers.ControlNetModel(**shape), seed)


def controlnet_of(folder: Path, seed: int = 0) -> Any:
    """diffusers' ControlNet for the model in a folder."""
    fields = inspect.signature(diffusers.ControlNetModel.__init__).parameters.keys()
    config = json.loads((folder / "unet" / "config.json").read_text())
    shape = {name: value for name, value in config.items() if name in fields}
    return controlnet({**shape, "conditioning_embedding_out_channels": HINT}, seed)


def small_controlnet(kind: str, seed: int = 0) -> Any:
    return controlnet({**SMALL, **NETS[kind]}, seed)


def adapter(config: dict[str, Any], seed: int = 0) -> Any:
    """diffusers' T2I-Adapter."""
    return randomized(diffusers.T2IAdapter(**config), seed)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
