"""What every autoencoder of images has in common: checks, scales, and a distribution of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..files import AnyPath
from ..ops import checks

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class LatentDistribution:
    """Independent normal distributions, one for each number of the latents.

    Args:
        mean: [B, C, h, w].
        log_variance: [B, C, h, w]; None where the latents are the mean, as a model's that was not
            trained to give a variance.
    """

    mean: Tensor
    log_variance: Tensor | None

    def mode(self) -> Tensor:
        """The most likely latents [B, C, h, w]."""
        return self.mean

    def sample(self, generator: Generators | None = None) -> Tensor:
        """Latents [B, C, h, w] drawn at random; nothing is drawn without a variance.

        Args:
            generator: one for all, or one for each image, so that its latents do not depend on its
                neighbours. The noise is drawn where the generator lives.

        Raises:
            ValueError: as many generators as images were expected.
        """
        if generator is None or isinstance(generator, torch.Generator):
            generators: list[torch.Generator | None] = [generator]
        else:
            generators = [*generator]
            if len(generators) != len(self.mean):
                checks.fail("generator", f"one, or {len(self.mean)}", len(generators))
        if self.log_variance is None:
            return self.mean
        count = len(self.mean) // len(generators)
        noise = torch.cat([self._noise(count, each) for each in generators])
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def _noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        mean = self.mean
        device = mean.device if generator is None else generator.device
        shape = (count, *mean.shape[1:])
        return torch.randn(shape, generator=generator, dtype=mean.dtype, device=device).to(
            mean.device
        )


class Autoencoder(nn.Module):
    """Images to latents of a fraction of their height and width, and back.

    Args:
        config: has ``in_channels``, ``latent_channels``, ``num_levels``, ``scaling_factor`` and
            ``shift_factor``.

    Attributes:
        encoder, decoder: its halves; a decoder begins with a convolution ``conv_in``.
    """

    encoder: Any
    decoder: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def downsampling(self) -> int:
        """Height and width of images over those of their latents: 8 for Stable Diffusion."""
        return 2 ** int(self.config.num_levels - 1)

    @property
    def upcasts(self) -> bool:
        """Whether it computes in float32 though its weights are float16."""
        return False

    @property
    def weight(self) -> Tensor:
        """One of the parameters, which tells dtype and device of all."""
        weight: Tensor = self.decoder.conv_in.weight
        return weight

    def encode(self, images: Tensor) -> LatentDistribution:
        """The distribution of the latents of images, not scaled.

        Args:
            images: [B, C, H, W] in [-1, 1], of the model's dtype; H and W multiples of
                :attr:`downsampling`.

        Raises:
            ValueError: another shape, dtype or device.
        """
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: [B, C', h, w] of the model's dtype, not scaled (see :meth:`unscale`).

        Returns:
            [B, C, H, W], about in [-1, 1]: not clipped.

        Raises:
            ValueError: another shape, dtype or device.
        """
        self.check_latents(latents)
        return self._run(self.decoder, self.decoder_input(latents))

    def forward(self, images: Tensor) -> Tensor:
        """The images [B, C, H, W] that the most likely latents of images decode to."""
        return self.decode(self.encode(images).mode())

    def decoder_input(self, latents: Tensor) -> Tensor:
        """What ``decoder`` is given for latents."""
        return latents

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write a folder that ``from_pretrained`` and diffusers load.

        Raises:
            OSError: it can't be written, for example because the disk is full. What the folder held
                before is still there then.
        """
        raise NotImplementedError

    def scale(self, latents: Tensor) -> Tensor:
        """Latents as the U-Net knows them, about of unit variance."""
        if self.config.shift_factor is not None:
            latents = latents - self.config.shift_factor
        return latents * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents to decode, from those of the U-Net: undoes :meth:`scale`."""
        latents = latents / self.config.scaling_factor
        if self.config.shift_factor is not None:
            latents = latents + self.config.shift_factor
        return latents

    def check_images(self, images: Any) -> None:
        """What :meth:`encode` refuses."""
        self._check("images", images, self.config.in_channels)
        if images.shape[2] % self.downsampling or images.shape[3] % self.downsampling:
            expected = f"height and width to be multiples of {self.downsampling}"
            checks.fail("images", expected, list(images.shape))

    def check_latents(self, latents: Any) -> None:
        """What :meth:`decode` refuses."""
        self._check("latents", latents, self.config.latent_channels)

    def _run(self, half: nn.Module, x: Tensor) -> Tensor:
        return half(x)

    def _check(self, name: str, x: Any, channels: int) -> None:
        checks.floating(name, x)
        if x.dim() != 4 or x.shape[1] != channels or not x.shape[2] or not x.shape[3]:
            checks.fail(name, f"shape [B, {channels}, height, width]", list(x.shape))
        if x.dtype != self.weight.dtype:
            checks.fail(name, f"the dtype of the model ({self.weight.dtype})", x.dtype)
        checks.same_device(name, x, "the model", self.weight)
