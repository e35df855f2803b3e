"""A U-Net step with a ControlNet or an IP-Adapter, beside the bare step in the same turns."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion_fast.models.controlled import ControlledUNet

from . import in_diffusers
from .in_diffusers import unet_options
from .measure import Call, Variant
from .networks import FEATURES, Networks
from .variants import BARE, Build, engine_step, on_reference, step_input, variants, wide, widened

SCALE = 0.6  # of what is added
Given = dict[str, Any]


class Steering(Protocol):
    """Something that steers a U-Net.

    Attributes:
        part: the name of its network among :class:`~.networks.Networks`.
    """

    part: str

    def drawn(self, networks: Networks, images: int) -> Tensor:
        """What it reads, at random, for both halves of guidance."""

    def ours(self, networks: Networks, drawn: Tensor) -> tuple[Any, Given]:
        """The steered U-Net, and its keywords beside the bare one's."""

    def theirs(self, networks: Networks, drawn: Tensor, x: Tensor, t: Tensor, given: Given) -> Call:
        """A step of diffusers with the bare one's keywords."""


class ByControlNet:
    """A ControlNet, over the whole run."""

    part = "controlnet"

    def drawn(self, networks: Networks, images: int) -> Tensor:
        return torch.cat([_random(networks, images, 3, *[networks.kind.pixels] * 2)] * 2)

    def ours(self, networks: Networks, drawn: Tensor) -> tuple[Any, Given]:
        scales = torch.full((len(drawn), 1), SCALE, device=drawn.device)
        windows = torch.tensor([0.0, 1000.0], device=drawn.device).expand(len(drawn), 1, 2)
        given = {"hints": drawn[:, None], "scales": scales, "windows": windows}
        return ControlledUNet(networks.unet, [networks.controlnet]), given

    def theirs(self, networks: Networks, drawn: Tensor, x: Tensor, t: Tensor, given: Given) -> Call:
        control, unet = in_diffusers.controlnet(networks), in_diffusers.unet(networks)
        options = unet_options(given)
        steering = {"controlnet_cond": drawn, "conditioning_scale": SCALE}

        def call() -> Tensor:
            down, mid = control(x, t, **steering, **options)
            residuals = {"down_block_additional_residuals": down}
            return unet(x, t, mid_block_additional_residual=mid, **residuals, **options)[0]

        return call


class ByIPAdapter:
    """An IP-Adapter and an image's CLIP embedding; zeros in the unconditional half."""

    part = "ip_adapter"

    def drawn(self, networks: Networks, images: int) -> Tensor:
        embeds = _random(networks, images, 1, FEATURES)
        return torch.cat((torch.zeros_like(embeds), embeds))

    def ours(self, networks: Networks, drawn: Tensor) -> tuple[Any, Given]:
        model = copy.copy(networks.unet)
        model._modules = networks.unet._modules | {
            "ip_adapters": nn.ModuleList([networks.ip_adapter])
        }
        weights = drawn.new_full((1, len(model.cross_attentions()), 1), SCALE)
        tokens = networks.ip_adapter.projection(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
        return model, {"image_tokens": [tokens], "image_weights": weights}

    def theirs(self, networks: Networks, drawn: Tensor, x: Tensor, t: Tensor, given: Given) -> Call:
        unet = in_diffusers.unet_with_ip_adapter(networks, SCALE)
        options = unet_options(given)
        options["added_cond_kwargs"] = (options["added_cond_kwargs"] or {}) | {
            "image_embeds": [drawn]
        }
        return lambda: unet(x, t, **options)[0]


STEERINGS: dict[str, Steering] = {"controlnet": ByControlNet(), "ip-adapter": ByIPAdapter()}


def _random(networks: Networks, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator).to(networks.device, networks.dtype)


def steered_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    """One call of the steered U-Net, and one of the bare U-Net; ``steps`` is 1."""
    by, (x, t, bare) = STEERINGS[networks.kind.steering], step_input(networks, images)
    drawn = by.drawn(networks, images)
    model, more = by.ours(networks, drawn)
    given = bare | more

    def bare_diffusers() -> Call:
        unet, options = in_diffusers.unet(networks), unet_options(bare)
        return lambda: unet(x, t, **options)[0]

    builds: dict[str, Build] = {
        "eager": lambda: on_reference(lambda: model(x, t, **given)),
        "model": lambda: lambda: model(x, t, **given),
        "diffusers": lambda: by.theirs(networks, drawn, x, t, bare),
        "engine": lambda: engine_step(model, x, t, given),
        f"{BARE} diffusers": bare_diffusers,
        f"{BARE} engine": lambda: engine_step(networks.unet, x, t, bare),
    }
    return variants(builds, networks, compiles, "unet", by.part)


def steered_truth(networks: Networks, images: int, steps: int) -> Tensor:
    by, (x, t, bare) = STEERINGS[networks.kind.steering], step_input(networks, images)
    exact = networks.exact("unet", by.part)
    model, more = by.ours(exact, wide(by.drawn(networks, images), exact.dtype))
    given = widened(bare, exact.dtype) | more
    return on_reference(lambda: model(wide(x, exact.dtype), t, **given))()


def beside_bare(rows: list[Given]) -> list[Given]:
    """The rows with ``of_bare``: how much of the bare engine's ratio to diffusers is left."""
    over = {row["variant"]: row.get("over_diffusers") for row in rows}
    bare = over.get(f"{BARE} engine")
    for row in rows:
        if row["variant"] == "engine" and bare and row.get("over_diffusers"):
            row["of_bare"] = row["over_diffusers"] / bare
    return rows
