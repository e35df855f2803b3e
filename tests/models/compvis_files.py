"""CompVis files with random weights, of small models with the structure of the real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from unet_parity import random_weights

from diffusion_fast.models.compvis_unet import unet_name
from diffusion_fast.models.compvis_vae import vae_name
from diffusion_fast.models.config import UNetConfig
from diffusion_fast.models.vae_config import VAEConfig

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
KINDS = ("sd1", "sd2", "sdxl")

UNETS: dict[str, UNetConfig] = {
    "sd1": UNetConfig.preset("sd15", block_out_channels=(32, 32, 64, 64), cross_attention_dim=64),
    "sd2": UNetConfig.preset(
        "sd21",
        block_out_channels=(64, 64, 128, 128),
        cross_attention_dim=64,
        attention_head_dim=(1, 1, 2, 2),
    ),
    "sdxl": UNetConfig.preset(
        "sdxl",
        block_out_channels=(64, 64, 128),
        cross_attention_dim=128,
        attention_head_dim=(1, 1, 2),
        transformer_layers_per_block=(1, 2, 3),
        projection_class_embeddings_input_dim=64 + 6 * 256,
    ),
}
VAES = {
    "sd1": VAEConfig.preset("sd", block_out_channels=(32, 32, 64, 64)),
    "sd2": VAEConfig.preset("sd", block_out_channels=(32, 32, 64, 64)),
    "sdxl": VAEConfig.preset("sdxl", block_out_channels=(32, 32, 64, 64)),
}


def states_of(model_class: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights for a model of diffusers."""
    with torch.device("meta"):
        model = model_class.from_config(config)
    return {name: value.clone() for name, value in random_weights(model).items()}


def unet_states(config: UNetConfig) -> dict[str, Tensor]:
    state = states_of(diffusers.UNet2DConditionModel, config.to_dict())
    return {UNET + unet_name(name, config): value for name, value in state.items()}


def vae_states(config: VAEConfig, prefix: str = VAE) -> dict[str, Tensor]:
    state = states_of(diffusers.AutoencoderKL, config.to_dict())
    named = {prefix + vae_name(name, config): value for name, value in state.items()}
    return {  # there the attention's projections are 1x1 convolutions
        name: value[..., None, None] if ".attn_1." in name and value.dim() == 2 else value
        for name, value in named.items()
    }


def clip_states(prefix: str, width: int = 64, layers: int = 2) -> dict[str, Tensor]:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        vocab_size=50,
        bos_token_id=48,
        eos_token_id=49,
    )
    with torch.device("meta"):
        model = transformers.CLIPTextModelWithProjection(config)
    state = {
        n: v.clone() for n, v in random_weights(model).items() if n != "text_projection.weight"
    }
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {prefix + name: value for name, value in state.items()}


def open_clip_states(prefix: str, width: int = 64, layers: int = 24) -> dict[str, Tensor]:
    shapes = {
        "positional_embedding": (77, width),
        "token_embedding.weight": (50, width),
        "text_projection": (width, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "logit_scale": (),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, (rows, columns) in {
            "mlp.c_fc.": (4 * width, width),
            "mlp.c_proj.": (width, 4 * width),
            "attn.out_proj.": (width, width),
            "attn.in_proj_": (3 * width, width),
        }.items():
            shapes |= {f"{block}{name}weight": (rows, columns), f"{block}{name}bias": (rows,)}
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


def file_states(kind: str, in_channels: int = 4) -> dict[str, Tensor]:
    """All tensors of a file."""
    unet = dataclasses.replace(UNETS[kind], in_channels=in_channels)
    state = unet_states(unet) | vae_states(VAES[kind])
    if kind in CLIP:
        state |= clip_states(CLIP[kind])
    if kind in OPEN_CLIP:
        state |= open_clip_states(OPEN_CLIP[kind], layers=24 if kind == "sd2" else 2)
    emas = {f"model_ema.{name.replace('.', '')}": torch.ones(1) for name in list(state)[:3]}
    return state | emas | {"alphas_cumprod": torch.ones(1000), "betas": torch.ones(1000)}


def write_file(kind: str, folder: Path, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    state = file_states(kind, **changes)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )
    return folder / "model.safetensors", state
