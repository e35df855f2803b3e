"""A U-Net with all that steers it by images: ControlNets and T2I-Adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import checks
from .blocks import Composite
from .config import UNetConfig
from .controlnet import ControlNet
from .layers import Residual
from .t2i_adapter import T2IAdapter
from .unet import UNet2DCondition
from .unet_encoder import Residuals

Control = ControlNet | T2IAdapter
SHARED = ("text_embeds", "time_ids", "context_lengths")  # conditions that ControlNets take too


class ControlledUNet(Composite):
    """A U-Net, and networks that read hints and add to what it computes.

    Args:
        unet: the U-Net.
        controls: the networks; each may have another kind.
        guess_mode: ControlNets act on the conditional half of guidance alone (with ``scales`` of 0
            for the other one), and less on fine layers: see :meth:`ControlNet.forward
            <diffusion_fast.models.controlnet.ControlNet.forward>`.

    Raises:
        ValueError: a network for another base.
    """

    def __init__(
        self, unet: UNet2DCondition, controls: Sequence[Control], guess_mode: bool = False
    ) -> None:
        super().__init__()
        for control in controls:
            check_base(control, unet)
        grains = sorted({grain_of(control) for control in controls})
        if len(grains) != 1:
            checks.fail("controls", "networks whose hints are equally large", grains)
        self.grain = grains[0]
        self.unet, self.controls = unet, nn.ModuleList(controls)
        self.guess_mode = guess_mode

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        *,
        hints: Tensor,
        scales: Tensor,
        windows: Tensor,
        **conditions: Any,
    ) -> Tensor:
        """The U-Net's output for noisy images, with N networks.

        Args:
            x, t, context: as those of
                :meth:`UNet2DCondition.forward <diffusion_fast.UNet2DCondition.forward>`.
            hints: what each network reads, [B, N, 3, H, W] in [0, 1].
            scales: what it adds times this, float32 [B, N].
            windows: at timesteps from the first to the second of these, float32 [B, N, 2].
            conditions: other arguments of that method; ControlNets have :data:`SHARED` in common.

        Raises:
            ValueError: an argument that is missing, not expected, or of the wrong shape or dtype.
        """
        self.unet.check_image(x)
        self.check_hints(len(x), x.shape[2:], hints, scales, windows)
        factors = self.factors(t.expand(len(x)), scales, windows, x.dtype)
        shared = {name: value for name, value in conditions.items() if name in SHARED}
        residuals: list[list[Residual]] = []
        features: list[list[Residual]] = []
        for i, control in enumerate(cast("list[Control]", self.controls)):
            if isinstance(control, T2IAdapter):
                features.append([(one, factors[i]) for one in control(hints[:, i])])
                continue
            seen = x[:, : control.config.in_channels]
            own = control(seen, t, context, hints[:, i], **shared, guess_mode=self.guess_mode)
            residuals.append([(one, factors[i]) for one in own])
        return self.unet(
            x,
            t,
            context,
            residuals=by_place(residuals),
            features=by_place(features),
            **conditions,
        )

    @staticmethod
    def factors(t: Tensor, scales: Tensor, windows: Tensor, dtype: torch.dtype) -> Tensor:
        """What each network's residuals are multiplied by, [N, B, 1, 1, 1], at timesteps t [B]."""
        at = t.to(windows)[:, None]
        acts = (windows[..., 0] <= at) & (at <= windows[..., 1])
        return (scales * acts).to(dtype).mT[..., None, None, None]

    def check_hints(
        self, batch: int, size: Sequence[int] | None, hints: Any, scales: Any, windows: Any
    ) -> None:
        """Raise ValueError unless these fit a batch of images of a height and width, or of any."""
        weight, count = self.unet.conv_in.weight, len(self.controls)
        for name, value in (("hints", hints), ("scales", scales), ("windows", windows)):
            checks.floating(name, value)
            checks.same_device(name, value, "the model", weight)
        sides = hints.shape[3:] if size is None else [side * self.grain for side in size]
        checks.shape("hints", hints, (batch, count, 3, *sides), "[B, N, 3, H, W]")
        checks.same_dtype("hints", hints, "the model", weight)
        checks.shape("scales", scales, (batch, count), "[B, N]")
        checks.shape("windows", windows, (batch, count, 2), "[B, N, 2]")


def by_place(networks: Sequence[Sequence[Residual]]) -> Residuals:
    """What each network adds, as what all of them add in each place."""
    most = max(map(len, networks), default=0)
    return [[one[i] for one in networks if i < len(one)] for i in range(most)]


def grain_of(control: Control) -> int:
    """How many pixels of a hint, in each direction, are one of the latents."""
    return (control.control_config if isinstance(control, ControlNet) else control.config).grain


def check_base(control: Control, unet: UNet2DCondition) -> None:
    """Raise ValueError for a network that was made for another U-Net."""
    config = unet.config
    widths = config.block_out_channels
    if isinstance(control, T2IAdapter):
        own, halvings = control.config.widths, control.config.halvings
        wanted, places = (*widths, widths[-1]), _halvings(config)  # of the levels and the bottom
        count = len(own)
        if count < len(widths) or (own, halvings) != (wanted[:count], places[:count]):
            expected = f"a T2I-Adapter for this U-Net ({_features(widths, places)})"
            checks.fail("control", expected, _features(own, halvings))
        return
    own_config = control.config
    fields = ("block_out_channels", "layers_per_block", "cross_attention_dim")
    for name in (*fields, "addition_embed_type"):
        wanted, found = getattr(config, name), getattr(own_config, name)
        if name == "layers_per_block":
            wanted, found = config.per_level(name), own_config.per_level(name)
        if wanted != found:
            checks.fail("control", f"a ControlNet for this U-Net ({name} {wanted})", found)
    if own_config.in_channels not in (config.in_channels, config.out_channels):
        expected = f"a ControlNet for this U-Net (in_channels {config.out_channels})"
        checks.fail("control", expected, own_config.in_channels)


def _halvings(config: UNetConfig) -> tuple[int, ...]:
    """How many times the latents are halved where features join each level, and at the bottom."""
    last = config.num_levels - 1
    attends = [kind == "CrossAttnDownBlock2D" for kind in config.down_block_types]
    return *(min(i + (not attends[i]), last) for i in range(last + 1)), last


def _features(widths: Sequence[int], halvings: Sequence[int]) -> str:
    parts = (f"{width} at 1/{2**n}" for width, n in zip(widths, halvings, strict=False))
    return f"features of {', '.join(parts)} of the latents' size"
