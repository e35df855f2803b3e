"""The ways to decode latents, and to encode prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_fast.engine.rewrites.decoder import FreshDecoder

from ..peers import PEERS
from . import in_diffusers
from .in_diffusers import Served
from .measure import Call, Variant
from .networks import TOKENS, Networks
from .variants import Build, on_reference, variants


def with_peers(module: Callable[[], nn.Module], *inputs: Tensor) -> dict[str, Build]:
    """A module's call on these inputs: as it is, and by each peer."""

    def plain() -> Call:
        made = module()
        return lambda: made(*inputs)

    def build(name: str) -> Call:
        compute = Served(module(), PEERS[name])
        return lambda: compute(*inputs)

    return {"diffusers": plain, **{name: functools.partial(build, name) for name in PEERS}}


# Decoding --------------------------------------------------------------------------------------


def decode_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    """One call of the autoencoder's decoder; ``steps`` is 1."""
    vae, z = networks.vae, latents(networks, images)

    def engine() -> Call:
        decoder = FreshDecoder(vae)
        return lambda: decoder(z)

    ours: dict[str, Build] = {
        "eager": lambda: on_reference(lambda: vae.decode(z)),
        "model": lambda: lambda: vae.decode(z),
        "engine": engine,
    }
    theirs = with_peers(lambda: in_diffusers.Decoding(in_diffusers.autoencoder(networks)), z)
    return variants(ours | theirs, networks, compiles, "vae")


def latents(networks: Networks, images: int) -> Tensor:
    return networks.inputs(images).x_T.to(networks.dtype)


def decode_truth(networks: Networks, images: int, steps: int) -> Tensor:
    exact, z = networks.exact("vae"), latents(networks, images)
    return on_reference(lambda: exact.vae.decode(z.to(exact.dtype)))()


# Text ------------------------------------------------------------------------------------------


class Encoding(nn.Module):
    """The text encoders from token ids [B, 77], for each encoder, to the U-Net's context."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.encoders, self.text = nn.ModuleList(text.encoders), text

    def forward(self, *ids: Tensor) -> Tensor:
        return self.text.states(ids).context


def encode_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    """The prompts of B images, both halves of guidance; ``steps`` is 1.

    The networks are those of ``transformers``, here as in diffusers, so there is one way beside the
    peers' ways.
    """
    builds = with_peers(lambda: Encoding(networks.text), *token_ids(networks, images))
    return variants(builds, networks, compiles, "text")


def token_ids(networks: Networks, images: int) -> list[Tensor]:
    """Random prompts, both halves of guidance, that end with the last token."""
    ids = torch.randint(1000, (2 * images, TOKENS), generator=torch.Generator().manual_seed(0))
    return [_ended(ids, encoder).to(networks.device) for encoder in networks.text.encoders]


def _ended(ids: Tensor, encoder: Any) -> Tensor:
    ids = ids.clone()
    ids[:, -1] = encoder.config.eos_token_id
    return ids


def encode_truth(networks: Networks, images: int, steps: int) -> Tensor:
    return networks.exact("text").text.states(token_ids(networks, images)).context
