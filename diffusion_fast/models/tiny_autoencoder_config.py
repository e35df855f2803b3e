"""The tiny autoencoder's configuration, in the names of diffusers' ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from .config import MOST_LAYERS
from .config_json import json_values, own_fields

KIND = "AutoencoderTiny"

# Fields of diffusers' AutoencoderTiny that this model fixes. `latent_magnitude` and `latent_shift`
# are for latents stored in bytes, which nothing here does.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "force_upcast": (False,),
}


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Shape of an :class:`~.tiny_autoencoder.AutoencoderTiny`, in diffusers' names.

    Args:
        in_channels, out_channels: channels of the images read and drawn.
        encoder_block_out_channels, decoder_block_out_channels: of each level, all equal.
        latent_channels: of the latents.
        num_encoder_blocks, num_decoder_blocks: residual blocks of each level, in the order of the
            computation.
        scaling_factor, shift_factor: the U-Net's latents are ``(z - shift) * scaling``.
        latent_magnitude, latent_shift: for latents stored in bytes; kept for other programs.

    Raises:
        ValueError: a value that is out of range or doesn't fit another one.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0
    latent_magnitude: float = 3
    latent_shift: float = 0.5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON has lists; a frozen config is hashable
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("in_channels", "out_channels", "latent_channels"):
            checks.positive_int(name, getattr(self, name))
        for half in ("encoder", "decoder"):
            self._check_half(half)
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            expected = f"{len(self.num_encoder_blocks)} levels, as the encoder"
            checks.fail("num_decoder_blocks", expected, list(self.num_decoder_blocks))
        checks.finite("scaling_factor", self.scaling_factor)
        if self.scaling_factor <= 0:
            checks.fail("scaling_factor", "a positive number", self.scaling_factor)
        if self.shift_factor is not None:
            checks.finite("shift_factor", self.shift_factor)

    def _check_half(self, half: str) -> None:
        widths = getattr(self, f"{half}_block_out_channels")
        blocks = getattr(self, f"num_{half}_blocks")
        if not isinstance(widths, tuple) or len(set(widths)) != 1:
            checks.fail(f"{half}_block_out_channels", "one width for all levels", repr(widths))
        checks.positive_int(f"{half}_block_out_channels", widths[0])
        if not isinstance(blocks, tuple) or len(blocks) != len(widths):
            checks.fail(f"num_{half}_blocks", f"{len(widths)} numbers, one per level", repr(blocks))
        for count in blocks:
            checks.positive_int(f"num_{half}_blocks", count)
            if count > MOST_LAYERS:
                checks.fail(f"num_{half}_blocks", f"at most {MOST_LAYERS} each", count)

    @property
    def num_levels(self) -> int:
        return len(self.num_decoder_blocks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyAutoencoderConfig:
        """A config from the contents of a diffusers ``config.json``."""
        values = {k: v for k, v in values.items() if k != "block_out_channels"}  # the decoder's
        return cls(**own_fields(cls, KIND, FIXED, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that diffusers reads; JSON types only."""
        return json_values(self, FIXED)
