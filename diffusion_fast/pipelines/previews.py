"""Previews: pictures by a tiny autoencoder of what is still being drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..engine.rewrites.decoder import FreshDecoder
from ..files import AnyPath
from ..models import UNet2DCondition
from ..models.tiny_autoencoder import AutoencoderTiny
from ..models.vae_memory import Autoencoding
from ..ops import checks


class Previews:
    """Decodes what ``preview`` is given, at a small part of what the model's autoencoder takes.

    Args:
        unet: whose latents they are.
        grain: pixels of a picture, in each direction, that are one of the latents.
        rewrites: as :class:`~diffusion_fast.Engine` takes them.
    """

    def __init__(self, unet: UNet2DCondition, grain: int, rewrites: str | Iterable[str]) -> None:
        self._unet, self._grain, self._rewrites = unet, grain, rewrites
        self._coder: Autoencoding | None = None

    def load(self, autoencoder: AutoencoderTiny | AnyPath) -> None:
        """Take a tiny autoencoder (TAESD), loaded before or a path of its decoder or both halves.

        Raises:
            CheckpointError: a damaged file, or another kind of model.
            ValueError: one for other latents; nothing changes then.
        """
        if not isinstance(autoencoder, AutoencoderTiny):
            autoencoder = AutoencoderTiny.from_pretrained(autoencoder)
        channels = self._unet.config.out_channels
        own = autoencoder.config.latent_channels, autoencoder.downsampling
        if own != (channels, self._grain):
            expected = f"one of {channels} latent channels and {self._grain} x {self._grain} pixels"
            got = f"{own[0]} channels and {own[1]} x {own[1]} pixels"
            checks.fail("autoencoder", expected, got)
        autoencoder = autoencoder.to(self._unet.conv_in.weight).eval()
        self._coder = Autoencoding(autoencoder, FreshDecoder(autoencoder, self._rewrites))

    def __call__(self, latents: Tensor, output: str = "pil") -> Any:
        """Pictures of latents [N, C, h, w]; noise that is in them is in the pictures too.

        Args:
            latents: as the pipeline gives them to ``preview``, or to ``callback``.
            output: ``"pil"`` for N PIL images, ``"tensor"`` for [N, 3, H, W] in [-1, 1].

        Raises:
            ValueError: no autoencoder was loaded.
        """
        checks.one_of("output", output, ("pil", "tensor"))
        if self._coder is None:
            checks.fail("previews", "a tiny autoencoder (pipe.previews.load)", None)
        images = self._coder.decode(latents)
        if output == "tensor":
            return images
        from ..images import to_pil  # imports Pillow

        return to_pil(images)

    def to(self, *args: Any, **kwargs: Any) -> None:
        """Move or cast the autoencoder."""
        if self._coder is not None:
            self._coder.vae.to(*args, **kwargs)
