"""The configuration of a ControlNet, in the names of diffusers' ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from .config import UNetConfig
from .config_json import json_values, own_fields

KIND = "ControlNetModel"
HINT_CHANNELS = 3
# Fields of diffusers that this model fixes, see :mod:`.config_json`.
FIXED: dict[str, tuple[Any, ...]] = {"conditioning_channels": (HINT_CHANNELS,)}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}  # whether it attends


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a :class:`~.controlnet.ControlNet`.

    Args:
        unet: the shape of the U-Net whose first half it has.
        mid_block_type: ``"UNetMidBlock2DCrossAttn"``, or ``"UNetMidBlock2D"`` without a transformer
            at the bottom.
        conditioning_embedding_out_channels: channels of the layers that the hint goes through, at
            full size, half of it and so on.
        controlnet_conditioning_channel_order: ``"rgb"`` or ``"bgr"``, of the hints it was trained
            with.
        global_pool_conditions: what it adds is averaged over the image (shuffle).

    Raises:
        ValueError: a value that is out of range.
    """

    unet: UNetConfig
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        widths = self.conditioning_embedding_out_channels
        object.__setattr__(self, "conditioning_embedding_out_channels", tuple(widths))
        for width in self.conditioning_embedding_out_channels or (0,):
            checks.positive_int("conditioning_embedding_out_channels", width)
        checks.one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        order = self.controlnet_conditioning_channel_order
        checks.one_of("controlnet_conditioning_channel_order", order, ("rgb", "bgr"))
        if not isinstance(self.global_pool_conditions, bool):
            checks.fail("global_pool_conditions", "True or False", self.global_pool_conditions)

    @property
    def grain(self) -> int:
        """How many pixels of a hint, in each direction, are one of the latents."""
        return int(2 ** (len(self.conditioning_embedding_out_channels) - 1))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ControlNetConfig:
        """A config from the contents of a diffusers ``config.json``.

        Raises:
            ValueError: another kind of model, or a field with an unsupported value.
        """
        got = values.get("_class_name", KIND)
        if got == "ControlNetUnionModel":
            raise ValueError(f"_class_name: ControlNet-Union ({got}) is not supported, only {KIND}")
        names = {*cls.__dataclass_fields__, *FIXED} - {"unet"}
        own = {"_class_name": got} | {n: v for n, v in values.items() if n in names}
        shared = {n: v for n, v in values.items() if n not in names and not n.startswith("_")}
        down = shared.get("down_block_types", UNetConfig.down_block_types)
        shared["up_block_types"] = [
            str(name).replace("DownBlock2D", "UpBlock2D") for name in reversed(down)
        ]
        return cls(UNetConfig.from_dict(shared), **own_fields(cls, KIND, FIXED, own))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that diffusers reads; JSON types only."""
        unet, own = self.unet.to_dict(), json_values(self, FIXED)
        absent = {"unet", "up_block_types", "out_channels", "sample_size", "mid_block_type"}
        return {n: v for n, v in (unet | own).items() if n not in absent - own.keys() | {"unet"}}
