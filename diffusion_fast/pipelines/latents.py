"""Images to latents and back, within one call of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models import vae_memory
from ..models.autoencoder import Autoencoder, LatentDistribution


class Autoencoding:
    """A VAE, run in parts where memory is short, that remembers how.

    Args:
        vae: the autoencoder.
        run: decodes latents in its place, such as
            :class:`~diffusion_fast.engine.rewrites.decoder.FreshDecoder`.
    """

    def __init__(self, vae: Autoencoder, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.vae, self._run = vae, run
        self._ways: list[str] = []

    @property
    def how(self) -> str | None:
        """The way with the smallest parts: whole, sliced or tiled; None before the first run."""
        return max(self._ways, key=vae_memory.HOW.index, default=None)

    def encode(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents [N, C, h, w], float32, for N generators of N images [N, 3, H, W], or of one."""
        encoded = vae_memory.encode(self.vae, images.to(self.vae.weight))
        self._ways.append(encoded.how)
        mean, log_variance = encoded.latents.mean, encoded.latents.log_variance
        shape = len(generators), *mean.shape[1:]
        spread = None if log_variance is None else log_variance.expand(shape)
        drawn = LatentDistribution(mean.expand(shape), spread)
        return self.vae.scale(drawn.sample(generators)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], float32."""
        unscaled = self.vae.unscale(latents).to(self.vae.weight)
        decoded = vae_memory.decode(self.vae, unscaled, run=self._run)
        self._ways.append(decoded.how)
        return decoded.images.float().clamp(-1, 1)
