"""What the arguments of a call ask of a model, checked; the messages name the arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..ops import checks
from ..samplers import SamplerOptions, reads_unconditional
from . import inputs
from .parts import Parts
from .prompts import Told, said


def pictures(
    parts: Parts, image: Any, mask: Any, size: Any, count: int, begun: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Images [B, 3, H, W] and masks [B, 1, H, W], checked.

    ``begun``: there are latents that another model began.
    """
    if parts.inpainting and (image is None or mask is None):
        missing = "image" if image is None else "mask"
        checks.fail(missing, "one, because the model is made for inpainting", None)
    if image is None:
        if parts.refines and not begun:
            expected = "one, or latents with denoising_start, because the model is a refiner"
            checks.fail("image", expected, None)
        inputs.absent("mask", mask, "image")
        return None, None
    grain = parts.vae.downsampling
    wanted = None if size is None else inputs.checked_size(size, grain)
    images = inputs.image_tensor(image, wanted, grain)
    inputs.check_batch("image", images, count)
    if mask is None:
        return images, None
    height, width = images.shape[2:]
    return images, inputs.mask_tensor(mask, image, (height, width), count)


def options_of(
    parts: Parts,
    steps: int | None,
    guidance_scale: Any,
    sampler: str | None,
    strength: float | None,
    from_image: bool,
    masked: bool,
    negative_prompt: Any,
    more: Mapping[str, Any],
) -> tuple[SamplerOptions, float | None, Any]:
    """How to sample; the strength and the guidance scale that were asked for or are usual."""
    own_grid = more.get("timesteps") is not None or more.get("sigmas") is not None
    if steps is None and not own_grid:
        steps = parts.defaults.steps
    if guidance_scale is None:
        guidance_scale = parts.defaults.guidance_scale
    steps, guidance_scale, strength = inputs.plain((steps, guidance_scale, strength))
    if steps is not None:
        checks.positive_int("steps", steps)
    if not from_image:
        inputs.absent("strength", strength, "image")
    elif strength is None:
        strength = 1.0 if masked else 0.3 if parts.refines else 0.8
    told = guidance_scale
    if parts.embeds_guidance:
        inputs.check_embedded(guidance_scale, negative_prompt, more)
        told = 1.0
    options = SamplerOptions(**parts.scheduler.table(sampler)).replace(
        **{name: inputs.plain(value) for name, value in more.items()},
        steps=steps,
        guidance_scale=told,
        strength=None if masked and strength == 1 else strength,  # pure noise
    )
    if own_grid:
        options = options.replace(steps=options.steps_of(parts.scheduler.schedule.timesteps))
    if not reads_unconditional(options):
        told = inputs.guidance(told)
        options = options.replace(guidance_scale=told)
    elif parts.embeds_guidance:
        expected = "one without CFG++, because the model takes the guidance scale as an input"
        checks.fail("sampler", expected, sampler)
    return options, strength, guidance_scale if parts.embeds_guidance else told


def size_of(parts: Parts, size: Any, latents: Tensor | None = None) -> inputs.Size:
    """Height and width as asked for, or of latents, or as the model was trained."""
    grain = parts.vae.downsampling
    if latents is not None:
        own = latents.shape[2] * grain, latents.shape[3] * grain
        if size is not None and inputs.checked_size(size, grain) != own:
            checks.fail("size", f"None, or {own} as the latents", repr(size))
        return own
    if size is not None:
        return inputs.checked_size(size, grain)
    trained = parts.unet.config.sample_size or 64
    height, width = trained if isinstance(trained, tuple) else (trained, trained)
    return height * grain, width * grain


def told(
    parts: Parts,
    prompts: list[str],
    negatives: list[str] | None,
    guided: bool,
    steps: Callable[[], int],
) -> Told:
    """What the prompts say at each step and, with guidance, the negative ones."""
    known = parts.text.embeddings.names
    positive = said("prompt", prompts, steps, known)
    if not guided:
        return Told(positive, None, False)
    zeros = negatives is None and parts.zero_empty
    texts = negatives or [""] * len(prompts)
    return Told(positive, said("negative_prompt", texts, steps, known), zeros)
