"""The U-Net's configuration, in the names of diffusers' ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from .config_json import json_values, own_fields

DOWN_BLOCK_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCK_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D")

MOST_LAYERS = 1000  # of a kind in a level; a damaged config could have us build forever

# Fields of diffusers' UNet2DConditionModel that this model fixes, with the values that mean "off"
# or "as usual". The first one is what `to_dict` writes.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a :class:`~diffusion_fast.models.UNet2DCondition`.

    Fields have the names, meanings and defaults of diffusers' ``UNet2DConditionModel``. A field
    "per level" is one value for all levels or a sequence with one value each, finest level first.

    Args:
        sample_size: height and width the model was trained at; for information only.
        in_channels, out_channels: number of channels of the image or latent, in and out.
        flip_sin_to_cos: the sinusoidal embedding has its cosines first.
        freq_shift: 0 or 1, the end point of the sinusoids' frequencies.
        down_block_types, up_block_types: per level, with or without attention; down from the finest
            level, up from the coarsest.
        block_out_channels: channels of each level, a multiple of ``norm_num_groups``.
        layers_per_block: residual blocks on the way down, per level; one more on the way up.
        downsample_padding: 1 all around, or 0 for one row and column at the end.
        dropout: inside the residual blocks, in training.
        norm_num_groups, norm_eps: groups of a group norm, and what it adds to the variance.
        cross_attention_dim: channels of the context.
        transformer_layers_per_block: transformer blocks after a residual block, per level.
        attention_head_dim: the number of heads in spite of its name, per level.
        use_linear_projection: the transformers' projections are stored as [C, C], not [C, C, 1, 1].
        upcast_attention: accepted and ignored; attention always has float32 scores.
        resnet_time_scale_shift: the time embedding is added (``"default"``) or scales and shifts
            the second norm (``"scale_shift"``).
        time_embedding_dim: 4 * block_out_channels[0] by default.
        addition_embed_type: None, or ``"text_time"`` (SDXL): pooled text and sizes join the time
            embedding.
        addition_time_embed_dim: sinusoids per number of ``time_ids``.
        projection_class_embeddings_input_dim: channels of pooled text and all sinusoids together.
        time_cond_proj_dim: sinusoids of the guidance scale, which joins the time embedding of a
            distilled model (LCM); None for a model that is guided by two calls.
        conv_in_kernel, conv_out_kernel: odd kernel sizes.
        num_classes: not one of diffusers'. Class labels take the place of text states: an embedding
            makes one context token of a label, and label ``num_classes`` means "no class".

    Raises:
        ValueError: a value that is out of range or doesn't fit another one.

    Examples:
        >>> df.UNetConfig.preset("digits").num_classes
        10
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON has lists; a frozen config is hashable
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if self.upcast_attention is None:  # SDXL's config.json
            object.__setattr__(self, "upcast_attention", False)
        dims = self.cross_attention_dim
        if isinstance(dims, tuple) and len(dims) == self.num_levels and len(set(dims)) == 1:
            object.__setattr__(self, "cross_attention_dim", dims[0])
        self._check_levels()
        self._check_values()

    def _check_levels(self) -> None:
        """Sequences have one value per level, and those values fit together."""
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not channels:
            checks.fail("block_out_channels", "a sequence of channels, one per level", channels)
        for name, known in (
            ("down_block_types", DOWN_BLOCK_TYPES),
            ("up_block_types", UP_BLOCK_TYPES),
        ):
            types = getattr(self, name)
            if not isinstance(types, tuple) or len(types) != self.num_levels:
                checks.fail(name, f"{self.num_levels} names, one per level", types)
            for block_type in types:
                checks.one_of(name, block_type, known)
        for name in (
            "block_out_channels",
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
        ):
            values = self.per_level(name)
            if len(values) != self.num_levels:
                checks.fail(name, f"one value or {self.num_levels}, one per level", values)
            for value in values:
                checks.positive_int(name, value)
                if "layers" in name and value > MOST_LAYERS:
                    checks.fail(name, f"at most {MOST_LAYERS}", value)
        checks.positive_int("norm_num_groups", self.norm_num_groups)
        heads = self.per_level("attention_head_dim")
        for level, width in enumerate(channels):
            if width % self.norm_num_groups:
                checks.fail(
                    "block_out_channels",
                    f"multiples of norm_num_groups ({self.norm_num_groups})",
                    list(channels),
                )
            if self.has_attention(level) and width % heads[level]:
                checks.fail(
                    "attention_head_dim",
                    f"a number of heads that divides the {width} channels of level {level}",
                    heads[level],
                )

    def _check_values(self) -> None:
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            checks.positive_int(name, getattr(self, name))
        for name in ("time_embedding_dim", "time_cond_proj_dim", "num_classes"):
            if getattr(self, name) is not None:
                checks.positive_int(name, getattr(self, name))
        for name in ("conv_in_kernel", "conv_out_kernel"):
            checks.positive_int(name, getattr(self, name))
            if getattr(self, name) % 2 == 0:
                checks.fail(name, "an odd kernel size", getattr(self, name))
        for name in ("flip_sin_to_cos", "use_linear_projection", "upcast_attention"):
            if not isinstance(getattr(self, name), bool):
                checks.fail(name, "True or False", repr(getattr(self, name)))
        if self.downsample_padding not in (0, 1):
            checks.fail("downsample_padding", "0 or 1", self.downsample_padding)
        if self.freq_shift not in (0, 1):
            checks.fail("freq_shift", "0 or 1", self.freq_shift)
        checks.finite("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            checks.fail("dropout", "a probability in [0, 1)", self.dropout)
        checks.finite("norm_eps", self.norm_eps)
        if self.norm_eps <= 0:
            checks.fail("norm_eps", "a positive number", self.norm_eps)
        checks.one_of(
            "resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift")
        )
        if self.addition_embed_type not in (None, "text_time"):
            checks.fail("addition_embed_type", "None or 'text_time'", self.addition_embed_type)
        if self.addition_embed_type == "text_time":
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                checks.positive_int(name, getattr(self, name))

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def time_dim(self) -> int:
        """Channels of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def time_per_image(self) -> bool:
        """Whether more than the timestep enters the time embedding, another one for each image."""
        return self.addition_embed_type is not None or self.time_cond_proj_dim is not None

    def per_level(self, field: str) -> tuple[int, ...]:
        """A field as one value per level, finest first."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * self.num_levels

    def has_attention(self, level: int) -> bool:
        """Whether any block of a level attends; the middle block, at the coarsest, always does."""
        return (
            level == self.num_levels - 1
            or self.down_block_types[level] == "CrossAttnDownBlock2D"
            or self.up_block_types[-1 - level] == "CrossAttnUpBlock2D"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """A config from the contents of a diffusers ``config.json``.

        Keys that start with ``_`` are ignored. Fields of diffusers that this model doesn't
        implement are accepted with the value that switches them off.

        Raises:
            ValueError: another kind of model, an unknown field, or one with an unsupported value.
        """
        return cls(**own_fields(cls, "UNet2DConditionModel", FIXED, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that diffusers reads; JSON types only."""
        values = json_values(self, FIXED)
        if self.num_classes is None:
            del values["num_classes"]
        return values

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UNetConfig:
        """A well-known config, with single fields replaced by ``changes``.

        Args:
            name: ``"sd15"``, ``"sd15_inpainting"``, ``"sd21"`` (768 x 768, v-prediction),
                ``"sdxl"`` or ``"digits"`` (classes 0 to 9, 8 x 8 pixels, 0.9 M parameters).

        Raises:
            ValueError: no preset of this name.
        """
        checks.one_of("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})


_SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

PRESETS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd15_inpainting": {**_SD15, "in_channels": 9},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "digits": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "num_classes": 10,
    },
}
