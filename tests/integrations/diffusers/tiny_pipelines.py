"""Tiny Stable Diffusion and SDXL pipelines with random weights, and LoRA files for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}
SDXL: dict[str, Any] = {
    **SD,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
# Everything in a U-Net that a LoRA can be for.
ALL_LAYERS = (
    r".*(to_[qkv]|to_out\.0|net\.0\.proj|proj_in|proj_out|net\.2|linear_\d|time_emb_proj"
    r"|conv(_in|_out|_shortcut|1|2)?)"
)


def unet(kind: str, **changes: Any) -> diffusers.UNet2DConditionModel:
    config = {"sd": SD, "sdxl": SDXL}[kind]
    model = diffusers.UNet2DConditionModel(**{**config, **changes})
    return model.eval().requires_grad_(False)


def vae(**changes: Any) -> diffusers.AutoencoderKL:
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return diffusers.AutoencoderKL(**{**config, **changes}).eval().requires_grad_(False)


def scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**STABLE_DIFFUSION)


STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def pipeline(kind: str = "sd", task: str = "", **parts: Any) -> diffusers.DiffusionPipeline:
    """``task``: "" (text), "Img2Img" or "Inpaint"."""
    names = ["text_encoder", "tokenizer"]
    if kind == "sd":
        cls = getattr(diffusers, f"StableDiffusion{task}Pipeline")
        names += ["safety_checker", "feature_extractor"]
        options: dict[str, Any] = {"requires_safety_checker": False}
    else:
        cls = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")
        names += ["text_encoder_2", "tokenizer_2"]
        options = {"add_watermarker": False}
    made = {"unet": unet(kind), "vae": vae(), "scheduler": scheduler()}
    pipe = cls(**{**dict.fromkeys(names), **made, **parts}, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: diffusers.DiffusionPipeline, **options: Any) -> Tensor:
    """[B, 3, H, W], always of the same prompt and noise."""
    generator = torch.Generator().manual_seed(5)
    dtype = pipe.unet.dtype
    embeds = {
        "prompt_embeds": torch.randn(1, 7, 24, generator=generator).to(dtype),
        "negative_prompt_embeds": torch.randn(1, 7, 24, generator=generator).to(dtype),
    }
    if "XL" in type(pipe).__name__:
        pooled = torch.randn(2, 1, 20, generator=generator).to(dtype)
        embeds["pooled_prompt_embeds"], embeds["negative_pooled_prompt_embeds"] = pooled
    defaults: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    if "Img2Img" in type(pipe).__name__ or "Inpaint" in type(pipe).__name__:
        defaults["strength"] = 0.8
        defaults["image"] = torch.rand(1, 3, 32, 32, generator=generator)
    else:
        defaults["height"] = defaults["width"] = 32
    if "Inpaint" in type(pipe).__name__:
        defaults["mask_image"] = (torch.rand(1, 1, 32, 32, generator=generator) > 0.5).float()
        defaults["height"] = defaults["width"] = 32
    return pipe(**embeds, generator=generator, **{**defaults, **options}).images


def unet_inputs(model: diffusers.UNet2DConditionModel, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator).to(model.dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 24, generator=generator).to(model.dtype),
    }
    if model.config.addition_embed_type:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 20, generator=generator).to(model.dtype),
            "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * batch),
        }
    return inputs


@torch.no_grad()
def predict(pipe: diffusers.DiffusionPipeline, **changes: Any) -> Tensor:
    """What the pipeline's U-Net says, always for the same input."""
    return pipe.unet(**{**unet_inputs(pipe.unet), **changes}).sample


def lora_file(
    folder: Path, kind: str, name: str, layers: str = ALL_LAYERS, **options: Any
) -> tuple[Path, str]:
    """A LoRA with random weights, as diffusers saves it: folder and file name."""
    model = unet(kind)
    config = LoraConfig(r=3, lora_alpha=4, target_modules=layers, **options)
    model.add_adapter(config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter.data, std=0.2)
    cls = diffusers.StableDiffusionPipeline if kind == "sd" else diffusers.StableDiffusionXLPipeline
    cls.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(model), weight_name=f"{name}.safetensors"
    )
    return folder, f"{name}.safetensors"
