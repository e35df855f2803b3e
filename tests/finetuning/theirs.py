"""The networks of a folder as diffusers and transformers have them; what they make of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection


def networks_of(folder: Path) -> dict[str, Any]:
    """U-Net and text encoders, by the names of components."""
    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    return {
        name: kind.from_pretrained(folder / name)
        for name, kind in kinds.items()
        if (folder / name).is_dir()
    }


def encoded(
    networks: dict[str, Any], context: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """What the U-Net is told: states, and for SDXL what is added to the timestep."""
    if "tokens" not in context:
        prompt = context["context"].to(dtype)
        if "text_embeds" not in context:
            return prompt, None
        pooled = context["text_embeds"].to(dtype)
    else:
        tokens = context["tokens"].unbind(1)
        if len(tokens) == 1:
            return networks["text_encoder"](tokens[0])[0], None
        first = networks["text_encoder"](tokens[0], output_hidden_states=True)
        second = networks["text_encoder_2"](tokens[1], output_hidden_states=True)
        states = [first.hidden_states[-2], second.hidden_states[-2]]
        prompt, pooled = torch.cat(states, dim=-1), second[0]
    return prompt, {"text_embeds": pooled, "time_ids": context["time_ids"].to(dtype)}


def epsilon_loss(
    networks: dict[str, Any], folder: Path, batch: Any, seed: int, dtype: torch.dtype
) -> Tensor:
    """The mean squared error of the noise, drawn for a batch of two as the trainer does."""
    latents = batch[0]
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(1000, (2,), generator=generator)[: len(latents)]
    noise = torch.randn((2, *latents.shape[1:]), generator=generator)[: len(latents)]
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    # The tables of the examples are float32; here in the dtype of the truth.
    abar = scheduler.alphas_cumprod.double()[t].to(dtype).view(-1, 1, 1, 1)
    noisy = (abar.sqrt() * latents + (1 - abar).sqrt() * noise).to(dtype)
    prompt, added = encoded(networks, batch[1], dtype)
    predicted = networks["unet"](noisy, t, prompt, added_cond_kwargs=added, return_dict=False)[0]
    return F.mse_loss(predicted, noise.to(dtype))


def assert_equal_pictures(pipe: Any, theirs: Any, prompt: str) -> None:
    """Ours and a pipeline of diffusers draw the same from the same noise."""
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}
    wanted = theirs(prompt, latents=noise, output_type="np", **options).images
    found = pipe(prompt, steps=3, guidance_scale=5.0, size=64, output="tensor").images
    assert (found - torch.from_numpy(wanted).permute(0, 3, 1, 2) * 2 + 1).abs().max() < 1e-4
