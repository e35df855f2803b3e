"""Our U-Net over the layers of ComfyUI's: the same weights, nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any, cast

import torch
from torch import nn

from ...models import UNet2DCondition
from ...models.blocks import MultiHead
from ...models.compvis_unet import unet_config, unet_name
from ...models.config import UNetConfig
from ..twin import Twin, Unlike
from .norms import OnOps

# ComfyUI's layers that compute what PyTorch's do, with weights that they may cast on their way.
_KINDS = ("disable_weight_init.", "manual_cast.")
_CASTS = ("comfy_cast_weights", "weight_function", "bias_function")
_NORMS = (nn.GroupNorm, nn.LayerNorm)

Place = tuple[torch.dtype, torch.device]
_placed: Callable[[Any], Place] = attrgetter("weight.dtype", "weight.device")


def config_of(theirs: nn.Module) -> UNetConfig:
    """The config of ComfyUI's U-Net.

    Raises:
        KeyError, ValueError: a U-Net that ours can't be.
    """
    return unet_config({name: tuple(v.shape) for name, v in theirs.state_dict().items()})


class ComfyTwin(Twin):
    """See :class:`~diffusion_fast.integrations.twin.Twin`.

    A layer is called as it is where ComfyUI does something to its weight on the way: it is of
    another dtype or device than the computation, or a LoRA is applied to it there (little memory).

    Args:
        theirs: ComfyUI's U-Net.
        config: its config.
        place: dtype and device of the computation.
    """

    known = ("comfy.", "torch.nn.")

    def __init__(self, theirs: nn.Module, config: UNetConfig, place: Place) -> None:
        self.place = place
        with torch.device("meta"):
            ours = UNet2DCondition(config).eval()
        names = {
            name: unet_name(f"{name}.weight", config).removesuffix(".weight")
            for name, module in ours.named_modules()
            if not isinstance(module, nn.Dropout)  # theirs must not drop anything
        }
        self._heads = {
            names[f"{name}.to_q"].removesuffix(".to_q"): module.heads
            for name, module in ours.named_modules()
            if isinstance(module, MultiHead)
        }
        super().__init__(theirs, ours, names)

    def same(self, module: nn.Module, name: str) -> bool:
        """Whether a method of the module's own does what its class's does: this package's do."""
        return isinstance(vars(module)[name], OnOps) or super().same(module, name)

    def plain(self, layer: nn.Module) -> bool:
        """Whether a layer's class and its weight and bias are all that its call is."""
        if self.patch(layer):
            return False
        cls, its = type(layer), cast("Any", layer)
        if cls.__module__ != "comfy.ops":
            return super().plain(layer)
        if not cls.__qualname__.startswith(_KINDS) or its.weight_function or its.bias_function:
            return False
        dtype, device = _placed(layer)
        if isinstance(layer, _NORMS):  # ours cast them to the dtype themselves
            return device == self.place[1]
        return (dtype, device) == self.place

    def state(self) -> Any:
        """What ComfyUI changes about layers when it loads, moves and patches a model."""
        casting: list[Any] = [m for m in self._modules if type(m).__module__ == "comfy.ops"]
        asked = [list(map(attrgetter(name), casting)) for name in _CASTS]
        own = list(map(methodcaller("get", "forward"), map(vars, self._modules)))
        return self.place, [list(map(bool, one)) for one in asked], list(map(_placed, casting)), own

    def _check_block(self, path: str, module: nn.Module) -> None:
        heads = self._heads.get(path)
        if heads is not None and getattr(module, "heads", None) != heads:
            raise Unlike(f"{path}.heads: expected {heads}, got {getattr(module, 'heads', None)}")
        super()._check_block(path, module)
