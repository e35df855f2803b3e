"""A T2I-Adapter's configuration, in the names of diffusers' ``config.json``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import checks
from .config_json import json_values, own_fields

KIND = "T2IAdapter"
TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Shape of a :class:`~.t2i_adapter.T2IAdapter`, in the names of diffusers' ``config.json``.

    Args:
        in_channels: channels of the hint: 3, or 1 for grey ones (sketch, canny).
        channels: of the features of each level.
        num_res_blocks: residual blocks of each level.
        downscale_factor: pixels of the hint, in each direction, that make one of the first level.
        adapter_type: ``"full_adapter"``, ``"full_adapter_xl"`` or ``"light_adapter"``.

    Raises:
        ValueError: a value that is out of range.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        for name in ("in_channels", "num_res_blocks", "downscale_factor"):
            checks.positive_int(name, getattr(self, name))
        for width in self.channels or (0,):
            checks.positive_int("channels", width)
        if self.in_channels not in (1, 3):
            checks.fail("in_channels", "1 or 3", self.in_channels)
        checks.one_of("adapter_type", self.adapter_type, TYPES)

    @property
    def light(self) -> bool:
        return self.adapter_type == "light_adapter"

    @property
    def grain(self) -> int:
        """How many pixels of a hint, in each direction, are one of the latents."""
        xl = self.adapter_type == "full_adapter_xl"  # its first features join the second level
        return self.downscale_factor // (1 + xl)

    def halves(self, level: int) -> bool:
        """Whether a level's features have half the height and width of those before."""
        return level == 2 if self.adapter_type == "full_adapter_xl" else level > 0

    @property
    def halvings(self) -> tuple[int, ...]:
        """How many times each level's features halve the height and width of the latents."""
        first = int(self.downscale_factor > self.grain)
        more = itertools.accumulate(map(self.halves, range(1, len(self.widths))), initial=first)
        return tuple(more)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the features of each level."""
        return (*self.channels, self.channels[-1]) if self.light else self.channels

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T2IAdapterConfig:
        """A config from the contents of a diffusers ``config.json``."""
        return cls(**own_fields(cls, KIND, {}, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that diffusers reads; JSON types only."""
        return json_values(self, {})
