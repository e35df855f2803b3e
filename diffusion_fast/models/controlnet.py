"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): the first half of a U-Net reads a hint, and
what its layers leave is added to what those of the U-Net leave."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import AnyPath
from ..ops import checks
from .blocks import Composite
from .checkpoints import save_model
from .controlnet_config import HINT_CHANNELS, KIND, MID_BLOCKS, ControlNetConfig
from .controlnet_file import find_controlnet
from .layers import Conv2d
from .unet import UNet2DCondition
from .unet_encoder import ContextProjections, TimeProjections, UNetEncoder

GUESS = 0.1  # of the finest residual in guess mode; the coarsest has 1


class HintEmbedding(Composite):
    """An image [B, 3, f H, f W] in [0, 1] as what joins the first convolution, [B, C, H, W]."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv_in = Conv2d(HINT_CHANNELS, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in itertools.pairwise(widths):
            self.blocks.append(Conv2d(width, width, 3, padding=1))
            self.blocks.append(Conv2d(width, wider, 3, stride=2, padding=1))
        self.conv_out = Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """What a hint adds to a U-Net: a residual for each skip, and one for the bottom.

    It is the first half of a U-Net, whose blocks it has, with a layer for the hint before them and
    1x1 convolutions behind them. Parameters have the names and shapes of diffusers'
    ``ControlNetModel``.

    Args:
        config: the shape, see :class:`~.controlnet_config.ControlNetConfig`.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet, MID_BLOCKS[config.mid_block_type])
        self.control_config = config
        widths = config.unet.block_out_channels
        hint = config.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = HintEmbedding(hint, widths[0])
        skips = [widths[0]]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            skips += [width] * (config.unet.per_level("layers_per_block")[level] + (not last))
        self.controlnet_down_blocks = nn.ModuleList(Conv2d(n, n, 1) for n in skips)
        self.controlnet_mid_block = Conv2d(widths[-1], widths[-1], 1)

    @classmethod
    def from_unet(cls, unet: UNet2DCondition) -> ControlNet:
        """A ControlNet to train for a U-Net (section 3.2 of the paper): its first half as it is,
        and layers of zeros behind it and behind the hint's, so that it adds nothing yet.

        The hint's other layers are drawn from the global generator. Dtype and device are those of
        the U-Net.
        """
        made = cls(ControlNetConfig(unet.config)).to(unet.conv_in.weight)
        own = made.state_dict()
        made.load_state_dict(own | {n: v for n, v in unet.state_dict().items() if n in own})
        zeros = made.controlnet_cond_embedding.conv_out, *made.controlnet_down_blocks
        with torch.no_grad():
            for layer in (*zeros, made.controlnet_mid_block):
                for parameter in layer.parameters():
                    parameter.zero_()
        return made

    @classmethod
    def from_pretrained(
        cls,
        path: AnyPath,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> ControlNet:
        """A ControlNet with the weights of a checkpoint, in eval mode.

        Args:
            path: a folder with ``config.json`` and safetensors files, one file of weights beside
                its ``config.json``, a single file in the names of CompVis (lllyasviel) or of
                diffusers, or a hub id ``owner/name``.
            variant: which files of a folder to read, such as ``"fp16"``.
            dtype: dtype of the parameters; None for that of the files.
            device: device of the parameters.

        Raises:
            CheckpointError: a missing or damaged file, another kind of model (named), or tensors
                that are missing, extra or misshapen.
        """
        return find_controlnet(path, variant).build(cls, dtype, device)

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write a folder that :meth:`from_pretrained` and diffusers load.

        Raises:
            OSError: it can't be written; what was there before still is.
        """
        save_model(self, {"_class_name": KIND, **self.control_config.to_dict()}, folder)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        hint: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        context_lengths: Tensor | None = None,
        guess_mode: bool = False,
        embedded: Tensor | None = None,
    ) -> list[Tensor]:
        """What is added to a U-Net's skips in their order, and last of all to its bottom.

        Args:
            x, t, context, text_embeds, time_ids, context_lengths: as those of
                :meth:`UNet2DCondition.forward <diffusion_fast.UNet2DCondition.forward>`.
            hint: [B, 3, f H, f W] in [0, 1], with f = 8.
            guess_mode: weigh residuals from 0.1 for the finest to 1 for the bottom.
            embedded: what :meth:`embed_hint` gave of the hint, if that is known.

        Raises:
            ValueError: an argument that is missing, not expected, or of the wrong shape or dtype.
        """
        self.check_inputs(x, t, context, text_embeds, time_ids, None, context_lengths)
        self.check_hint(hint, x)
        emb = self.embed_time(t.expand(x.shape[0]), text_embeds, time_ids)
        kv = self.project_context(self.embed_context(context))
        time = self.project_time(emb)
        embedded = self.embed_hint(hint) if embedded is None else embedded
        return self.residuals(x, time, kv, context_lengths, embedded, guess_mode)

    def check_hint(self, hint: Tensor, x: Tensor) -> None:
        """Raise ValueError unless a hint fits images x [B, C, H, W]."""
        grain = self.control_config.grain
        shape = len(x), HINT_CHANNELS, x.shape[2] * grain, x.shape[3] * grain
        checks.shape("hint", hint, shape, f"[B, 3, {grain} H, {grain} W]")
        checks.same_dtype("hint", hint, "x", x)
        checks.same_device("hint", hint, "x", x)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """What joins the first convolution: it depends on neither step nor prompt."""
        bgr = self.control_config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(hint.flip(1) if bgr else hint)

    def residuals(
        self,
        x: Tensor,
        time: TimeProjections,
        kv: ContextProjections,
        context_lengths: Tensor | None,
        hint: Tensor,
        guess_mode: bool = False,
    ) -> list[Tensor]:
        """:meth:`forward` of what its methods made of the conditions."""
        x, skips = self.down(x, time, kv, context_lengths, hint=hint)
        ends = [*skips, self.mid(x, time, kv, context_lengths)]
        layers = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        found = [layer(end) for layer, end in zip(layers, ends, strict=True)]
        if self.control_config.global_pool_conditions:
            return [residual.mean((2, 3), keepdim=True) for residual in found]
        if guess_mode:
            last = len(found) - 1
            return [one * GUESS ** (1 - i / last) for i, one in enumerate(found)]
        return found
