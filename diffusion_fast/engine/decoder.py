"""The autoencoder's decoder with the rewrites that apply to it: an image costs one call of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models import blocks as plain
from ..models.vae import AutoencoderKL, Decoder, PixelAttention, UpBlock
from ..models.vae_config import VAEConfig
from ..ops import checks
from ..ops.op import Site
from ..turns import Turns
from . import folding
from .layers import Layer, Linear, is_plain
from .plan import bypassed
from .prepared_blocks import GroupNorm, On, ResBlock, Upsample, attend, image, pixels, same_conv
from .staleness import Edit, Watch

REWRITES = ("folded_upsample", "fused_qkv", "epilogues", "packed_weights", "removed_no_ops")


class PreparedPixelAttention:
    """Every pixel attends to all pixels, with one head."""

    def __init__(self, attention: PixelAttention, on: On) -> None:
        self.norm, self._op = GroupNorm(attention.group_norm), Site("attention")
        layers = [attention.to_q, attention.to_k, attention.to_v]
        if "fused_qkv" in on and all(map(is_plain, layers)):
            self.to_qkv = [Linear(lambda: folding.fused(*layers), on, derived=True)]
        else:
            self.to_qkv = [_linear(layer, on) for layer in layers]
        self.to_out = _linear(cast("nn.Linear", attention.to_out[0]), on)
        self.layers = [*self.to_qkv, self.to_out]

    def __call__(self, x: Tensor) -> Tensor:
        h = pixels(self.norm(x, silu=False))  # [B, HW, C]
        made = [layer(h) for layer in self.to_qkv]
        q, k, v = made if len(made) == 3 else made[0].chunk(3, dim=-1)
        h = attend(self._op, q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2))
        return image(self.to_out(h, residual=pixels(x)), x.shape[2:])


class PreparedDecoder:
    """Decodes as :meth:`AutoencoderKL.decode` does. Parameters are shared with the model.

    A float16 model that must compute in float32 (``force_upcast``) has its decoder copied to
    float32 once, not at each call.

    Args:
        vae: the autoencoder.
        rewrites: ``"all"``, ``"none"``, or names among this module's ``REWRITES``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, vae: AutoencoderKL, rewrites: str | Iterable[str] = "all") -> None:
        self.vae = vae
        self.on = frozenset(_names(rewrites))
        weight = vae.decoder.conv_in.weight
        self._placement = weight.dtype, weight.device
        upcast = weight.dtype == torch.float16 and vae.config.force_upcast
        self._decoder = copy.deepcopy(vae.decoder).float() if upcast else vae.decoder
        with torch.no_grad():
            self._build(self._decoder)

    def _build(self, decoder: Decoder) -> None:
        on, mid = self.on, decoder.mid_block
        self.conv_in, self.conv_out = (
            same_conv(decoder.conv_in, on),
            same_conv(decoder.conv_out, on),
        )
        self.norm_out = GroupNorm(decoder.conv_norm_out)
        first, last = (ResBlock(cast("plain.ResBlock", block), on) for block in mid.resnets)
        attentions = (
            PreparedPixelAttention(cast("PixelAttention", block), on) for block in mid.attentions
        )
        blocks: list[ResBlock | PreparedPixelAttention | Upsample] = [first, *attentions, last]
        for level in cast("list[UpBlock]", decoder.up_blocks):
            blocks += [ResBlock(one, on) for one in cast("list[plain.ResBlock]", level.resnets)]
            blocks += [Upsample(one, on) for one in cast("list[plain.Upsample]", level.upsamplers)]
        self.blocks = blocks

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, C, f h, f w] of latents [B, C', h, w], not scaled.

        Raises:
            ValueError: another shape, dtype or device.
        """
        self.vae.check_latents(latents)
        x = latents
        if self.vae.post_quant_conv is not None:
            x = self.vae.post_quant_conv(x)
        x = x.to(self._decoder.conv_in.weight.dtype)
        if "packed_weights" in self.on:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        for block in self.blocks:
            if isinstance(block, ResBlock):
                x = block(x, None, None)
            elif isinstance(block, Upsample):
                x = block(x, torch.Size((2 * x.shape[2], 2 * x.shape[3])))
            else:
                x = block(x)
        return self.conv_out(self.norm_out(x)).to(latents.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive again, in place, what depends on the weights.

        Raises:
            ValueError: the model was moved or cast: that takes a new decoder.
        """
        weight = self.vae.decoder.conv_in.weight
        if (weight.dtype, weight.device) != self._placement:
            made = "a model of {} on {}, as this was made for".format(*self._placement)
            checks.fail("vae", made, f"{weight.dtype} on {weight.device}")
        if self._decoder is not self.vae.decoder:
            self._decoder.load_state_dict(self.vae.decoder.state_dict())
        for layer in self.layers():
            layer.refresh()

    def layers(self) -> list[Layer]:
        """Every product and convolution."""
        inner = [layer for block in self.blocks for layer in block.layers]
        return [self.conv_in, *inner, self.conv_out]


class FreshDecoder:
    """Decodes with the rewrites and with the weights as they are at each call.

    What the rewrites derive is made at the first call and kept. Where hooks on blocks of the
    decoder would not run, the autoencoder decodes as it is. Several threads may share it.

    Args:
        vae: the autoencoder; it may be edited, moved and cast between two calls.
        rewrites: as :class:`~diffusion_fast.Engine` takes them, those that a decoder has not too.
    """

    def __init__(self, vae: AutoencoderKL, rewrites: str | Iterable[str] = "all") -> None:
        self.vae = vae
        names = [rewrites] if isinstance(rewrites, str) else list(rewrites)
        self.rewrites = REWRITES if "all" in names else [n for n in names if n in REWRITES]
        self._turns = Turns("FreshDecoder")
        self._prepared: PreparedDecoder | None = None
        self._watch = Watch()
        self._config: VAEConfig | None = None  # of what was prepared

    def __call__(self, latents: Tensor) -> Tensor:
        """As :meth:`PreparedDecoder.__call__`."""
        with self._turns:
            edit = self._watch.look(self.vae)
            if edit is Edit.MODEL or self.vae.config != self._config:
                self._prepared = self._config = None  # before the next one takes its memory
                if self.rewrites and bypassed(self.vae.decoder) is None:
                    self._prepared = PreparedDecoder(self.vae, self.rewrites)
                self._config = self.vae.config
            elif edit is Edit.VALUES and self._prepared is not None:
                self._config = None  # until it is done
                self._prepared.refresh()
                self._config = self.vae.config
            return (self._prepared or self.vae.decode)(latents)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.vae, self.rewrites)


def _linear(layer: nn.Linear, on: On) -> Linear:
    return Linear(lambda: folding.of(layer), on, opaque=layer)


def _names(rewrites: str | Iterable[str]) -> Iterable[str]:
    if isinstance(rewrites, str):
        checks.one_of("rewrites", rewrites, ("all", "none"))
        return REWRITES if rewrites == "all" else ()
    names = list(rewrites)
    for name in names:
        checks.one_of("rewrites", name, REWRITES)
    return names
