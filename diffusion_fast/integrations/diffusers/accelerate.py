"""A Stable Diffusion or SDXL pipeline of diffusers with our U-Net and VAE decoder inside.

The pipeline keeps its own modules, and only ``forward`` of the U-Net and of the VAE's decoder is
replaced by ours, which reads the same parameters (see :mod:`.twin`). So everything that is done
with those modules goes on working: LoRA of every kind, before and after, with scales, fused or not;
``.to()``; edits of weights in place; offloading of whole models; VAE slicing and tiling.

The ControlNets of a pipeline run by ours as well, and the U-Net takes their residuals and the
features of T2I-Adapters. An IP-Adapter's layers are called where they are, with the images beside
the text.

A call that asks for something our models don't have (FreeU, a patched module, ...) runs diffusers'
own forward instead. It warns once for each reason, and :func:`explain` counts them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from ...models.vae import Decoder
from ...models.vae_config import VAEConfig
from ...ops import checks
from ..twin import Unlike
from .replaced_controlnet import ControlNetReplacement
from .replaced_unet import UNetReplacement
from .replacement import Replacement, replacement_of, slot_of

SUPPORTED = (
    "a Stable Diffusion or SDXL pipeline, with a UNet2DConditionModel as `unet` and an"
    " AutoencoderKL (or AutoencoderTiny, which stays) as `vae`"
)


class DecoderReplacement(Replacement):
    def __init__(self, vae: Any) -> None:
        with torch.device("meta"):
            ours = Decoder(VAEConfig.from_dict(vae.config))
        super().__init__("VAE decoder", vae.decoder, ours)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """As ``Decoder.forward``."""
        arguments = {"sample": sample, "latent_embeds": latent_embeds}
        reason = None if latent_embeds is None else "the argument latent_embeds"
        return self.run(reason, lambda: self.ours(sample), arguments)


def accelerate(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Let a pipeline compute its U-Net and VAE decoder with ours; nothing is copied.

    Accelerating twice is accelerating once. Pipelines that share modules share the acceleration.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline (text, image-to-image, inpainting, ...).

    Returns:
        ``pipe`` itself.

    Raises:
        ValueError: another kind of pipeline or model, or a config that our models don't cover; the
            message names it, and the pipeline is as before.
    """
    unet, vae = _models(pipe)
    todo: list[Replacement] = []
    kinds: tuple[tuple[str, Any, Callable[[], Replacement]], ...] = (
        ("unet", unet, lambda: UNetReplacement(unet)),
        *(("vae", decoder, lambda: DecoderReplacement(vae)) for decoder in _decoders(vae)),
        *(
            ("controlnet", net, functools.partial(ControlNetReplacement, net))
            for net in _controlnets(pipe)
        ),
    )
    for name, module, make in kinds:
        if replacement_of(module) is not None:
            continue
        forward = vars(module).get(slot_of(module))
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            checks.fail(f"pipe.{name}", "a forward as diffusers wrote it", "a patched one")
        try:
            part = make()
        except (ValueError, Unlike) as error:
            raise ValueError(
                f"pipe.{name}: not a model that diffusion_fast has: {error}"
            ) from error
        todo.append(part)
    for part in todo:
        setattr(part.theirs, slot_of(part.theirs), part.forward)
    return pipe


def restore(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo :func:`accelerate`; a pipeline that isn't accelerated stays as it is.

    Returns:
        ``pipe`` itself.

    Raises:
        ValueError: not a pipeline that can be accelerated.
    """
    unet, vae = _models(pipe)
    for module in (unet, *_decoders(vae), *_controlnets(pipe)):
        if replacement_of(module) is None:
            continue
        slot = slot_of(module)
        if slot == "forward":
            del module.forward  # the class's comes to light
        else:
            setattr(module, slot, type(module).forward.__get__(module))
    return pipe


@dataclass(frozen=True)
class Explanation:
    """What runs an accelerated pipeline's modules; ``str()`` of it is readable.

    Attributes:
        unet, vae_decoder: None if it isn't accelerated.
        controlnets: the same of each ControlNet of the pipeline. Each part has ``calls``, how many
            ours has run, ``others``, how many diffusers' own forward has run, by reason, and
            ``problem()``, why the next one would be diffusers', or None.
    """

    unet: Replacement | None
    vae_decoder: Replacement | None
    controlnets: list[Replacement | None] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [("U-Net", self.unet), ("VAE decoder", self.vae_decoder)]
        parts += [("ControlNet", part) for part in self.controlnets]
        return "\n".join(str(part or f"{name}: not accelerated") for name, part in parts)


def explain(pipe: DiffusionPipeline) -> Explanation:
    """Which calls of a pipeline ran on our models since :func:`accelerate`, and why not the others.

    Raises:
        ValueError: not a pipeline that can be accelerated.
    """
    unet, vae = _models(pipe)
    controlnets = [replacement_of(net) for net in _controlnets(pipe)]
    return Explanation(replacement_of(unet), replacement_of(vae.decoder), controlnets)


def _controlnets(pipe: Any) -> list[Any]:
    """The ControlNets of a pipeline; of another kind (ControlNet-Union) none."""
    found: Any = getattr(pipe, "controlnet", None)
    nets = getattr(found, "nets", [found])  # of several in one
    return [net for net in nets if type(net) is ControlNetModel]


def _decoders(vae: Any) -> list[Any]:
    """The decoder that we have; a tiny autoencoder (TAESD) stays as it is."""
    decoders = [vae.decoder]
    return decoders if type(vae) is AutoencoderKL else []


def _models(pipe: Any) -> tuple[Any, Any]:
    if not isinstance(pipe, DiffusionPipeline):
        checks.fail("pipe", SUPPORTED, type(pipe).__name__)
    known: dict[str, tuple[type, ...]] = {
        "unet": (UNet2DConditionModel,),
        "vae": (AutoencoderKL, AutoencoderTiny),
    }
    for name, classes in known.items():
        model = getattr(pipe, name, None)
        if type(model) not in classes:
            has = "none" if model is None else type(model).__name__
            got = f"a {type(pipe).__name__} whose {name} is {has}"
            checks.fail("pipe", SUPPORTED, got)
    parts: Any = pipe
    return parts.unet, parts.vae
