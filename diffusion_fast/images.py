"""Tensors to pictures: one grid, written whole or not at all, carrying its settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .ops import checks

SETTINGS = "diffusion_fast"  # the PNG text chunk that holds the settings as JSON


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255, clipped."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def grid(x: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images in rows, left to right.

    Args:
        x: [N, C, H, W] in [-1, 1] with 1 or 3 channels.
        columns: images per row.
        scale: pixels per pixel.
        gap: pixels between images.

    Raises:
        ValueError: another number of channels or dimensions.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not len(x):
        checks.fail("x", "shape [N, C, H, W] with C = 1 or 3 and N > 0", list(x.shape))
    checks.positive_int("columns", columns)
    checks.positive_int("scale", scale)
    pixels = to_uint8(x).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = torch.full(
        (channels, rows * (height + gap) + gap, columns * (width + gap) + gap),
        64,
        dtype=torch.uint8,
    )
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array.squeeze(-1) if channels == 1 else array)


def save_png(image: Image.Image, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write a PNG that carries what made it; a full disk leaves no broken file behind.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text(SETTINGS, json.dumps(dict(settings)))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
