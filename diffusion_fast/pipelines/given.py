"""The tensors that an engine is given for a call: contexts, and what the loop starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Context, PerStep
from ..models.blocks import guidance_embedding
from ..models.text import TextStates
from . import inputs
from .latents import Autoencoding
from .parts import Parts
from .prompts import Told


def contexts(
    parts: Parts,
    told: Told,
    clip_skip: int,
    batch: int,
    size: inputs.Size,
    beside: Sequence[dict[str, Any]],
    scores: Sequence[float] = inputs.AESTHETIC_SCORES,
) -> tuple[Context | PerStep, Context | PerStep]:
    """What both halves of guidance are conditioned on, for ``batch`` images of each prompt.

    Args:
        told: what the prompts say.
        clip_skip: layers to leave out at the text encoders' ends.
        batch: images of each prompt.
        size: height and width of the images.
        beside: what else the model takes by keyword, the conditional half's first.
        scores: the refiner's aesthetic scores, likewise.
    """
    return told.contexts(
        lambda texts: parts.text.encode(texts, clip_skip),
        lambda states: _context(parts, states, batch, size, beside[0], scores[0]),
        lambda states: _context(parts, states, batch, size, beside[1], scores[1]),
    )


def _context(
    parts: Parts,
    states: TextStates,
    batch: int,
    size: inputs.Size,
    beside: dict[str, Any],
    score: float,
) -> Context:
    """What the U-Net is conditioned on, for ``batch`` images of each prompt.

    Args:
        states: of the prompts.
        batch: images of each.
        size: height and width of the images.
        beside: what else the model takes by keyword.
        score: the refiner's aesthetic score.
    """
    weight = parts.unet.conv_in.weight
    context = states.context.to(weight).repeat_interleave(batch, 0)
    if states.pooled is None:
        return {"context": context, **beside} if beside else context
    last = [score] if parts.refines else size
    time_ids = torch.tensor([[*size, 0, 0, *last]], device=weight.device)  # not cropped
    return {
        "context": context,
        "text_embeds": states.pooled.to(weight).repeat_interleave(batch, 0),
        "time_ids": time_ids.expand(len(context), -1),
        **beside,
    }


def embedded_guidance(parts: Parts, scale: Any) -> dict[str, Tensor]:
    """The guidance scale for a U-Net that takes it as an input, [1, D]."""
    width = parts.unet.config.time_cond_proj_dim
    if width is None:
        return {}
    embedded = guidance_embedding(torch.tensor([scale], dtype=torch.float64), width)
    return {"timestep_cond": embedded.to(parts.unet.conv_in.weight)}


def latent_shape(parts: Parts, count: int, height: int, width: int) -> tuple[int, ...]:
    grain = parts.vae.downsampling
    return count, parts.unet.config.out_channels, height // grain, width // grain


def start(
    parts: Parts,
    vae: Autoencoding,
    shape: tuple[int, ...],
    images: Tensor | None,
    masks: Tensor | None,
    strength: float | None,
    seeds: list[int],
    unfinished: Tensor | None = None,
) -> dict[str, Any]:
    """What the loop starts from. Each generator is asked in the order of diffusers."""
    device = parts.unet.conv_in.weight.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    start: dict[str, Any] = {"generator": generators}
    if unfinished is not None:
        return {**start, "x_T": unfinished.to(device, torch.float32)}
    if images is not None and (strength is not None or not parts.inpainting):
        start["x_0"] = vae.encode(images, generators).to(device)
    noise = [torch.randn(shape[1:], generator=generator) for generator in generators]
    start["x_T"] = torch.stack(noise).to(device)
    if images is not None and masks is not None:
        small = inputs.small_mask(masks, parts.vae.downsampling).to(device)
        if parts.inpainting:
            kept = vae.encode(images * (1 - masks), generators).to(device)
            extra = (small.expand(len(kept), -1, -1, -1), kept)
            start["extra_channels"] = torch.cat(extra, dim=1)
        else:
            start["mask"] = small
    return start
