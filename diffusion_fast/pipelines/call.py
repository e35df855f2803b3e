"""What a call asks of a model, checked, and the tensors that an engine is given for it.

A pipeline's call and a request of a batch pass through here alike. Messages name the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Context, PerStep
from ..models.blocks import guidance_embedding
from ..models.prompt import parse
from ..models.prompt_edits import at_steps, is_edited
from ..models.text import TextStates
from ..models.vae_memory import Autoencoding
from ..ops import checks
from ..samplers import SamplerOptions, reads_unconditional
from ..samplers.names import options_of as meaning_of
from ..samplers.registry import SAMPLERS
from . import inputs
from .parts import Parts


@dataclass(frozen=True)
class Said:
    """What prompts say.

    Attributes:
        texts: the different ones, each of all prompts.
        order: which of them it is at each step; empty where it is the same at all.
    """

    texts: list[tuple[str, ...]]
    order: list[int]


@dataclass(frozen=True)
class Told:
    """What both halves of guidance are told.

    Attributes:
        positive: of the prompts.
        negative: of the negative ones; None where their half doesn't run.
        zeros: whether zeros stand for the states of the negative ones.
    """

    positive: Said
    negative: Said | None
    zeros: bool

    def contexts(
        self,
        encode: Callable[[list[str]], TextStates],
        make: Callable[[TextStates], Context],
        make_negative: Callable[[TextStates], Context],
    ) -> tuple[Context | PerStep, Context | PerStep]:
        """The contexts of both halves.

        Args:
            encode: called once with all texts, so that their states are equally long.
            make, make_negative: a half's context from the states of its prompts.
        """
        halves = [self.positive] if self.negative is None else [self.positive, self.negative]
        every = list(dict.fromkeys(one for half in halves for said in half.texts for one in said))
        states = encode(every)

        def context(
            half: Said, make: Callable[[TextStates], Context], zeros: bool
        ) -> Context | PerStep:
            found = []
            for texts in half.texts:
                own = states[[every.index(one) for one in texts]]
                if zeros:
                    assert own.pooled is not None  # only SDXL has zeros
                    own = TextStates(torch.zeros_like(own.context), torch.zeros_like(own.pooled))
                found.append(make(own))
            return PerStep(found, half.order) if half.order else found[0]

        positive = context(self.positive, make, False)
        if self.negative is None:
            return positive, None
        return positive, context(self.negative, make_negative, self.zeros)


def said(
    name: str, prompts: Sequence[str], steps: Callable[[], int], embeddings: Collection[str] = ()
) -> Said:
    """What prompts say at each step, checked.

    Args:
        name: the argument, for errors.
        prompts: B texts.
        steps: gives the number of steps; called where a prompt changes with them.
        embeddings: words that stand for embeddings.

    Raises:
        ValueError: a text that :func:`~diffusion_fast.models.prompt.parse` refuses.
    """
    if not any(is_edited(prompt, name) for prompt in prompts):
        return Said([tuple(prompts)], [])
    count = steps()
    by_step = list(zip(*(at_steps(prompt, count, name) for prompt in prompts), strict=True))
    texts = list(dict.fromkeys(by_step))
    for text in dict.fromkeys(one for of_step in texts for one in of_step):
        parse(text, name, embeddings)
    return Said(texts, [texts.index(one) for one in by_step])


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
    spacing = more.get("timestep_spacing")
    means = meaning_of(options.sampler, options.timestep_spacing, SAMPLERS, options.convention)
    if spacing is not None and means.get("timestep_spacing", spacing) != spacing:
        expected = f"{means['timestep_spacing']!r} or none beside the sampler {options.sampler!r}"
        checks.fail("timestep_spacing", expected, repr(spacing))
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
    noise = [
        torch.randn(shape[1:], generator=one, dtype=torch.float32, device="cpu")
        for one in generators
    ]
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
