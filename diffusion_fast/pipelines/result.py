"""What a pipeline gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Result:
    """Images, and what they were made with.

    Attributes:
        images: N PIL images, or a tensor [N, 3, H, W] in [-1, 1] (``output="tensor"``), or the
            latents (``output="latent"``). The images of the first prompt come first.
        latents: [N, C, h, w], as the U-Net left them.
        seeds: one per image.
        settings: all else that decides what is drawn, in types that JSON has.
        vae: how images were encoded and decoded: ``"whole"``, or ``"sliced"`` or ``"tiled"`` where
            memory ran out; None if nothing was.
        flagged: which images the model's safety checker replaced by black ones; None if the
            pipeline has no checker.
        random_weights: the model was never trained (a tiny one), so the images mean nothing.
    """

    images: list[Image] | Tensor
    latents: Tensor
    seeds: list[int]
    settings: dict[str, Any]
    vae: str | None
    flagged: list[bool] | None
    random_weights: bool
