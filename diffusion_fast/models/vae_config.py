"""The autoencoder's configuration, in the names of diffusers' ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from .config import MOST_LAYERS
from .config_json import json_values, own_fields

DOWN_BLOCK_TYPE = "DownEncoderBlock2D"
UP_BLOCK_TYPE = "UpDecoderBlock2D"

# Fields of diffusers' AutoencoderKL that this model fixes, with the values that mean "off" or "as
# usual". The first one is what `to_dict` writes.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an :class:`~diffusion_fast.models.AutoencoderKL`.

    Fields have the names, meanings and defaults of diffusers' ``AutoencoderKL``.

    Args:
        in_channels, out_channels: number of channels of the images read and drawn.
        down_block_types, up_block_types: one name per level, ``"DownEncoderBlock2D"`` and
            ``"UpDecoderBlock2D"``.
        block_out_channels: channels of each level, finest first, multiples of ``norm_num_groups``.
        layers_per_block: residual blocks of each level of the encoder; the decoder has one more.
        latent_channels: number of channels of the latents.
        norm_num_groups: number of groups of each group norm.
        sample_size: height and width the model was trained at; for information only.
        scaling_factor, shift_factor: the U-Net's latents are ``(z - shift) * scaling``.
        force_upcast: float16 overflows in this model, so it computes in float32 whatever the dtype
            of its weights, see :class:`~diffusion_fast.models.AutoencoderKL`.
        use_quant_conv, use_post_quant_conv: a 1x1 convolution behind the encoder, and before the
            decoder.
        mid_block_add_attention: attention at the coarsest level.

    Raises:
        ValueError: a value that is out of range or doesn't fit another one.

    Examples:
        >>> df.VAEConfig(block_out_channels=(8,), norm_num_groups=4).latent_channels
        4
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN_BLOCK_TYPE,)
    up_block_types: tuple[str, ...] = (UP_BLOCK_TYPE,)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON has lists; a frozen config is hashable
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        self._check_levels()
        self._check_values()

    def _check_levels(self) -> None:
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not channels:
            checks.fail("block_out_channels", "a sequence of channels, one per level", channels)
        checks.positive_int("norm_num_groups", self.norm_num_groups)
        for width in channels:
            checks.positive_int("block_out_channels", width)
            if width % self.norm_num_groups:
                expected = f"multiples of norm_num_groups ({self.norm_num_groups})"
                checks.fail("block_out_channels", expected, list(channels))
        for name, known in (
            ("down_block_types", DOWN_BLOCK_TYPE),
            ("up_block_types", UP_BLOCK_TYPE),
        ):
            types = getattr(self, name)
            if not isinstance(types, tuple) or len(types) != self.num_levels:
                checks.fail(name, f"{self.num_levels} names, one per level", types)
            for block_type in types:
                checks.one_of(name, block_type, (known,))

    def _check_values(self) -> None:
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels"):
            checks.positive_int(name, getattr(self, name))
        if self.layers_per_block > MOST_LAYERS:
            checks.fail("layers_per_block", f"at most {MOST_LAYERS}", self.layers_per_block)
        for name in (
            "force_upcast",
            "use_quant_conv",
            "use_post_quant_conv",
            "mid_block_add_attention",
        ):
            if not isinstance(getattr(self, name), bool):
                checks.fail(name, "True or False", repr(getattr(self, name)))
        checks.finite("scaling_factor", self.scaling_factor)
        if self.scaling_factor <= 0:
            checks.fail("scaling_factor", "a positive number", self.scaling_factor)
        if self.shift_factor is not None:
            checks.finite("shift_factor", self.shift_factor)

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """A config from the contents of a diffusers ``config.json``.

        Keys that start with ``_`` are ignored. Fields of diffusers that this model doesn't
        implement are accepted with the value that switches them off.

        Raises:
            ValueError: another kind of model, an unknown field, or one with an unsupported value.
        """
        return cls(**own_fields(cls, "AutoencoderKL", FIXED, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that diffusers reads; JSON types only."""
        return json_values(self, FIXED)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VAEConfig:
        """A well-known config, with single fields replaced by ``changes``.

        Args:
            name: ``"sd"`` (SD 1.x and 2.x), ``"sdxl"``, or ``"tiny"`` (of the same structure,
                0.1 M parameters).

        Raises:
            ValueError: no preset of this name.
        """
        checks.one_of("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})


_SD: dict[str, Any] = {
    "down_block_types": (DOWN_BLOCK_TYPE,) * 4,
    "up_block_types": (UP_BLOCK_TYPE,) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}

PRESETS: dict[str, dict[str, Any]] = {
    "sd": _SD,
    "sdxl": {**_SD, "sample_size": 1024, "scaling_factor": 0.13025},
    "tiny": {
        **_SD,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
}
