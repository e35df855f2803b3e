"""Previews of ``diffusion-fast sample``: the picture so far, by a tiny autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..images import grid, save_picture, to_pil
from ..pipelines import StableDiffusion


def preview_file(out: Path) -> Path:
    """Where the previews of a picture are written: beside it, ``x.preview.png`` for ``x.png``."""
    return out.with_name(f"{out.stem}.preview{out.suffix}")


def previewing(pipe: StableDiffusion, out: Path) -> Callable[[int, float, Tensor], None]:
    """Writes the picture that each step predicts, in the place of the one before."""

    def write(step: int, t: float, latents: Tensor) -> None:
        images = pipe.previews(latents, "tensor")
        several = len(images) > 1
        save_picture(grid(images, len(images)) if several else to_pil(images)[0], out, None)

    return write
