"""The ControlNets and T2I-Adapters of a pipeline, and what a call asks of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..files import AnyPath, CheckpointError, read_json
from ..models import UNet2DCondition
from ..models.checkpoints import CONFIG, STEM
from ..models.controlled import Control, ControlledUNet, check_base, grain_of
from ..models.controlnet import ControlNet
from ..models.hub import resolve
from ..models.t2i_adapter import T2IAdapter
from ..models.t2i_adapter_config import KIND
from ..models.t2i_adapter_file import in_own_names
from ..models.tensors import stored
from ..ops import checks
from . import inputs


class Controls:
    """Networks that steer a U-Net by images, in the order in which they were loaded."""

    def __init__(self) -> None:
        self._loaded: dict[str, Control] = {}
        self._steered: ControlledUNet | None = None

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def names(self) -> list[str]:
        """Of all that are loaded."""
        return list(self._loaded)

    @property
    def networks(self) -> list[Control]:
        """The networks themselves."""
        return list(self._loaded.values())

    def load(
        self, path: AnyPath, unet: UNet2DCondition, grain: int, name: str, variant: str | None
    ) -> None:
        """Read a ControlNet or T2I-Adapter, see :meth:`StableDiffusion.load_control`."""
        self._check_name(name)
        weight = unet.conv_in.weight
        control = _read(path, variant, weight.dtype, weight.device)
        try:
            self.put(name, control, unet, grain)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def put(self, name: str, control: Control, unet: UNet2DCondition, grain: int) -> None:
        """Take a network that was loaded before, of the U-Net's dtype and device.

        Raises:
            ValueError: one for another base, or a name that is taken.
        """
        self._check_name(name)
        check_base(control, unet)
        if grain_of(control) != grain:
            wanted = f"one that reads {grain} x {grain} pixels for each of the latents"
            checks.fail("control", wanted, grain_of(control))
        self._loaded[name] = control

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name.strip():
            checks.fail("name", "a word", repr(name))
        if name in self._loaded:
            checks.fail("name", f"one that isn't taken ({', '.join(self.names)})", repr(name))

    def unload(self, name: str) -> None:
        """Forget a network. Raises ValueError: it isn't loaded."""
        checks.one_of("name", name, self._loaded)
        del self._loaded[name]
        self._steered = None

    def over(self, unet: UNet2DCondition, guess_mode: bool) -> UNet2DCondition | ControlledUNet:
        """The U-Net with all networks; itself without any."""
        if not self._loaded:
            return unet
        kept = self._steered
        if kept is None or kept.unet is not unet or [*kept.controls] != self.networks:
            kept = self._steered = ControlledUNet(unet, self.networks).eval()
        kept.guess_mode = guess_mode
        return kept


class Steering:
    """What a call asks of the networks, checked.

    Args:
        controls: those of the pipeline.
        images: the hints as they were given: one, or a list with one for each network.
        scales, starts, ends: one number, or one for each network.
        guess_mode: as asked for; a network that averages over the image (shuffle) has it always.

    Raises:
        ValueError: hints without networks or the other way round, a list of another length, a
            number out of range.
    """

    def __init__(
        self, controls: Controls, images: Any, scales: Any, starts: Any, ends: Any, guess_mode: bool
    ) -> None:
        count = len(controls)
        if not count and images is not None:
            checks.fail("control_image", "None without a control (pipe.load_control)", "an image")
        if count and images is None:
            expected = f"an image for {', '.join(controls.names)} (or pipe.controls.unload(name))"
            checks.fail("control_image", expected, None)
        if not isinstance(guess_mode, bool):
            checks.fail("guess_mode", "True or False", repr(guess_mode))
        self.networks = controls.networks
        several = isinstance(images, (list, tuple))
        self.images = list(images) if several else [images] * bool(count)
        if len(self.images) != count:
            expected = f"an image for each of {count} controls ({', '.join(controls.names)})"
            checks.fail("control_image", expected, len(self.images))
        self.scales = inputs.one_each("control_scale", scales, count, -math.inf, math.inf)
        self.starts = inputs.one_each("control_start", starts, count, 0, 1)
        self.ends = inputs.one_each("control_end", ends, count, 0, 1)
        for start, end in zip(self.starts, self.ends, strict=True):
            if start >= end:
                checks.fail("control_start", f"less than control_end ({end:g})", start)
        nets = [one for one in self.networks if isinstance(one, ControlNet)]
        self.guess_mode = guess_mode or any(
            one.control_config.global_pool_conditions for one in nets[:1]
        )
        if guess_mode and not nets:
            checks.fail("guess_mode", "False without a ControlNet", guess_mode)

    def size(self, grain: int) -> inputs.Size | None:
        """Height and width of the first hint, as multiples of ``grain``; None without hints."""
        return inputs.hint_size(self.images[0], grain) if self.images else None

    def contexts(
        self, size: inputs.Size, count: int, timesteps: Tensor, weight: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the model takes by keyword, for the conditional half of guidance and the other.

        Args:
            size: height and width of the images.
            count: their number.
            timesteps: of all model calls, in their order.
            weight: whose dtype and device the hints have.
        """
        if not self.networks:
            return {}, {}
        hints = []
        for network, image in zip(self.networks, self.images, strict=True):
            grey = isinstance(network, T2IAdapter) and network.config.in_channels == 1
            hint = inputs.hint_tensor("control_image", image, size, count, grey)
            hints.append(hint.expand(count, -1, -1, -1))
        windows = [
            _window(timesteps, start, end)
            for start, end in zip(self.starts, self.ends, strict=True)
        ]
        ignored = [
            scale if isinstance(network, T2IAdapter) or not self.guess_mode else 0.0
            for network, scale in zip(self.networks, self.scales, strict=True)
        ]
        both = {
            "hints": torch.stack(hints, dim=1).to(weight),
            "windows": torch.tensor([windows] * count, dtype=torch.float32, device=weight.device),
        }
        conditional, other = (
            torch.tensor([scales] * count, dtype=torch.float32, device=weight.device)
            for scales in (self.scales, ignored)
        )
        return {**both, "scales": conditional}, {**both, "scales": other}

    def settings(self) -> dict[str, Any]:
        """What a picture's settings keep."""
        if not self.networks:
            return {}
        return {
            "control_scale": self.scales,
            "control_start": self.starts,
            "control_end": self.ends,
            "guess_mode": self.guess_mode,
        }


def _window(timesteps: Tensor, start: float, end: float) -> tuple[float, float]:
    """The timesteps, from and to, of the calls in a part of all; a call must lie in it whole."""
    if (start, end) == (0, 1):
        return -math.inf, math.inf
    n = len(timesteps)
    inside = [float(t) for i, t in enumerate(timesteps) if start <= i / n and (i + 1) / n <= end]
    return (min(inside), max(inside)) if inside else (math.inf, -math.inf)


def _read(
    path: AnyPath, variant: str | None, dtype: torch.dtype, device: torch.device
) -> ControlNet | T2IAdapter:
    found = resolve(path, models={"": STEM}, variant=variant, others=())
    config = (found.parent if found.is_file() else found) / CONFIG
    adapter = config.is_file() and read_json(config).get("_class_name") == KIND
    if found.is_file() and found.name != CONFIG:
        adapter = adapter or in_own_names(stored([found]))
    kind: Any = T2IAdapter if adapter else ControlNet
    network: ControlNet | T2IAdapter = kind.from_pretrained(
        found, variant=variant, dtype=dtype, device=device
    )
    return network
