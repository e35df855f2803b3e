"""TAESD, a tiny autoencoder (Bohan 2023, github.com/madebyollin/taesd): fast, and nearly as good.

It was distilled from the autoencoder of a Stable Diffusion model, and reads and writes the latents
of that model's U-Net as they are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import AnyPath
from ..ops import checks
from .autoencoder import Autoencoder, LatentDistribution
from .blocks import Composite, Downsample, Upsample
from .checkpoints import save_model
from .layers import Conv2d, followed
from .tiny_autoencoder_config import KIND, TinyAutoencoderConfig
from .tiny_autoencoder_file import find_tiny, layer_name

CLAMP = 3.0  # of latents, smoothly


class TinyBlock(Composite):
    """relu(conv(relu(conv(relu(conv(x))))) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv3 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(followed(self.conv3, h, residual=x))


class TinyLevel(Composite):
    """Half or double the size first, or neither, then blocks."""

    def __init__(self, channels: int, blocks: int, resize: nn.Module | None) -> None:
        super().__init__()
        self.resize = resize
        self.blocks = nn.ModuleList(TinyBlock(channels) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.resize, Downsample):
            x = self.resize(x)
        elif self.resize is not None:
            x = self.resize(x, torch.Size((2 * x.shape[2], 2 * x.shape[3])))
        for block in self.blocks:
            x = block(x)
        return x


class TinyHalf(Composite):
    """A convolution, levels, a convolution."""

    def __init__(self, inside: int, widths: tuple[int, ...], blocks: tuple[int, ...], out: int):
        super().__init__()
        self.conv_in = Conv2d(inside, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            TinyLevel(width, count, self.resize(width) if level else None)
            for level, (width, count) in enumerate(zip(widths, blocks, strict=True))
        )
        self.conv_out = Conv2d(widths[-1], out, 3, padding=1)

    def resize(self, width: int) -> nn.Module:
        """What is between two levels."""
        raise NotImplementedError

    def through(self, x: Tensor) -> Tensor:
        """The levels and the last convolution."""
        for level in self.levels:
            x = level(x)
        return self.conv_out(x)


class TinyEncoder(TinyHalf):
    """Images [B, C, H, W] in [-1, 1] to latents [B, C', H / f, W / f]."""

    def resize(self, width: int) -> nn.Module:
        return Downsample(width, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.conv_in((x + 1) / 2))


class TinyDecoder(TinyHalf):
    """Latents [B, C', h, w] to images [B, C, f h, f w], about in [-1, 1]."""

    def resize(self, width: int) -> nn.Module:
        return Upsample(width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x / CLAMP) * CLAMP
        return self.through(F.relu(self.conv_in(x))) * 2 - 1


class AutoencoderTiny(Autoencoder):
    """TAESD: about the pictures of the model's own autoencoder, for a small part of its time.

    Args:
        config: the shape, see :class:`TinyAutoencoderConfig`.
        encodes: whether it has the encoder; one read from a decoder's file alone has not.
    """

    config: TinyAutoencoderConfig

    def __init__(self, config: TinyAutoencoderConfig, encodes: bool = True) -> None:
        super().__init__(config)
        latents = config.latent_channels
        widths, blocks = config.encoder_block_out_channels, config.num_encoder_blocks
        made = TinyEncoder(config.in_channels, widths, blocks, latents) if encodes else None
        self.encoder: TinyEncoder | None = made
        widths, blocks = config.decoder_block_out_channels, config.num_decoder_blocks
        self.decoder = TinyDecoder(latents, widths, blocks, config.out_channels)

    @classmethod
    def from_pretrained(
        cls,
        path: AnyPath,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> AutoencoderTiny:
        """A model with the weights of a checkpoint, in eval mode.

        Args:
            path: a diffusers folder or hub id; or one of the files ``taesd_decoder`` and
                ``taesd_encoder`` (``.safetensors`` or ``.pth``) of the model's own repository, or
                of others of its kind. The other one is read if it lies beside; without the encoder
                :meth:`encode` is refused.
            variant: which files of a folder to read, such as ``"fp16"``.
            dtype: dtype of the parameters; None for that of the files.
            device: device of the parameters.

        Raises:
            CheckpointError: a missing or damaged file, another kind of model, or an unsupported
                config.
        """
        source = find_tiny(path, variant)
        encodes = any(name.startswith("encoder.") for name in source.tensors)
        return source.build(partial(cls, encodes=encodes), dtype, device)

    def save_pretrained(self, folder: AnyPath) -> None:
        if self.encoder is None:
            checks.fail("save_pretrained", "an autoencoder with both halves", "a decoder alone")
        values = {"_class_name": KIND, **self.config.to_dict()}
        save_model(self, values, folder, partial(layer_name, config=self.config))

    def encode(self, images: Tensor) -> LatentDistribution:
        self.check_images(images)
        if self.encoder is None:
            expected = "a model with an encoder (its file was not beside the decoder's)"
            checks.fail("vae", expected, "a decoder alone")
        return LatentDistribution(self._run(self.encoder, images), None)
