"""The autoencoder of latent diffusion models (Kingma & Welling 2014; Rombach et al. 2022)."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..files import AnyPath
from .autoencoder import Autoencoder, LatentDistribution
from .blocks import Composite, Downsample, MultiHead, ResBlock, Upsample
from .checkpoints import save_model
from .layers import Conv2d, GroupNorm, pixels, project_onto
from .pretrained import find_pretrained
from .vae_config import VAEConfig

EPS = 1e-6  # of all norms


class PixelAttention(MultiHead):
    """Every pixel attends to all pixels, with one head: x + attention(norm(x))."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attend(pixels(self.group_norm(x, silu=False)))  # [B, HW, C]
        return project_onto(x, self.to_out[0], h)


class Block(Composite):
    """Residual blocks of one resolution."""

    def __init__(self, config: VAEConfig, in_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (layers - 1)
        self.resnets = nn.ModuleList(
            ResBlock(width, channels, None, config.norm_num_groups, EPS) for width in widths
        )


class DownBlock(Block):
    """One level of the encoder."""

    def __init__(self, config: VAEConfig, level: int) -> None:
        channels = config.block_out_channels
        above = channels[max(level - 1, 0)]
        super().__init__(config, above, channels[level], config.layers_per_block)
        last = level == config.num_levels - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels[level], padding=0)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class MidBlock(Block):
    """The coarsest level of either half: residual block, attention, residual block."""

    def __init__(self, config: VAEConfig) -> None:
        channels = config.block_out_channels[-1]
        super().__init__(config, channels, channels, 2)
        self.attentions = nn.ModuleList(
            [PixelAttention(channels, config.norm_num_groups)]
            if config.mid_block_add_attention
            else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class UpBlock(Block):
    """One level of the decoder."""

    def __init__(self, config: VAEConfig, level: int) -> None:
        channels = config.block_out_channels
        below = channels[min(level + 1, config.num_levels - 1)]
        super().__init__(config, below, channels[level], config.layers_per_block + 1)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels[level])])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = upsample(x, torch.Size((2 * x.shape[2], 2 * x.shape[3])))
        return x


class Encoder(Composite):
    """Images [B, C, H, W] to means and log variances of latents, [B, 2 C', H / f, W / f]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level) for level in range(config.num_levels)
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(Composite):
    """Latents [B, C', h, w] to images [B, C, f h, f w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level) for level in reversed(range(config.num_levels))
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], EPS)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(Autoencoder):
    """Images to latents of an eighth of their height and width, and back.

    Parameters have the names and shapes of diffusers' ``AutoencoderKL`` of the same config.

    A model in float16 whose config says ``force_upcast`` overflows (SDXL's does, and decodes to
    black images): :meth:`encode` and :meth:`decode` then compute in float32, with a temporary
    float32 copy of the half that runs, and return float16. That costs time and memory. A config
    that doesn't say, as those of SD 1.x and 2.x, counts as one that does: the field's default in
    diffusers, which only looks at it for SDXL, though. Where a model is known not to overflow,
    ``vae.config = dataclasses.replace(vae.config, force_upcast=False)`` makes it compute in
    float16. bfloat16 has the range of float32 and is used as it is.

    Args:
        config: the shape, see :class:`VAEConfig`.

    Examples:
        >>> vae = df.AutoencoderKL(df.VAEConfig(block_out_channels=(8,), norm_num_groups=4))
        >>> vae.decode(torch.randn(1, 4, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latents, latents, 1) if config.use_post_quant_conv else None

    @classmethod
    def from_pretrained(
        cls,
        path: AnyPath,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        scaling_factor: float | None = None,
    ) -> AutoencoderKL:
        """A model with the weights of a checkpoint, in eval mode.

        Args:
            path: the folder with ``config.json`` and safetensors files (of any version of
                diffusers), a pipeline's folder with such a folder ``vae``, one file of weights
                beside its ``config.json``, a single CompVis file (``.safetensors`` or ``.ckpt``),
                or a hub id ``owner/name``.
            variant: which files of a folder to read, such as ``"fp16"``.
            dtype: dtype of the parameters; None for that of the files.
            device: device of the parameters.
            scaling_factor: where the files don't tell it, which is so for one CompVis file with
                nothing but an autoencoder; None for that of SD 1.x and 2.x, with a warning.

        Raises:
            CheckpointError: a missing or damaged file, an unsupported config, or tensors that are
                missing, extra or misshapen (listed by name).
        """
        source = find_pretrained(path, "vae", VAEConfig.from_dict, variant, renamed, scaling_factor)
        return source.build(cls, dtype, device)

    def save_pretrained(self, folder: AnyPath) -> None:
        save_model(self, {"_class_name": "AutoencoderKL", **self.config.to_dict()}, folder)

    @property
    def upcasts(self) -> bool:
        return self.weight.dtype == torch.float16 and self.config.force_upcast

    def encode(self, images: Tensor) -> LatentDistribution:
        self.check_images(images)
        moments = self._run(self.encoder, images)  # [B, 2C', h, w]
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return LatentDistribution(mean, log_variance.clamp(-30, 20))

    def decoder_input(self, latents: Tensor) -> Tensor:
        return latents if self.post_quant_conv is None else self.post_quant_conv(latents)

    def _run(self, half: nn.Module, x: Tensor) -> Tensor:
        """The encoder or decoder, in float32 where float16 overflows."""
        if not self.upcasts:
            return half(x)
        weights = {name: value.float() for name, value in half.named_parameters()}
        return torch.func.functional_call(half, weights, (x.float(),)).to(x.dtype)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")


def renamed(name: str) -> str:
    """The name of a parameter that older diffusers called ``name``; other names as they are."""
    match = _OLD_NAME.fullmatch(name)
    if match is None:
        return name
    prefix, layer, suffix = match.groups()
    return prefix + _OLD_ATTENTION[layer] + suffix
