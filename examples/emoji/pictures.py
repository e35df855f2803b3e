"""Grids of pictures with words, and examples of inpainting and image-to-image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_fast.images import grid, to_pil
from diffusion_fast.pipelines import StableDiffusion

SWAPS = (
    ("a red apple", "a green apple"),
    ("cat face", "tiger face"),
    ("pizza", "pie"),
    ("a red heart", "a blue heart"),
    ("dog face", "panda"),
    ("cupcake", "ice cream"),
)
VARIATIONS = ("a green apple", "tomato", "a blue apple", "peach")
STRENGTHS = (0.4, 0.6, 0.8)


def labelled(
    file: Path, images: Tensor, texts: Sequence[str], columns: int, scale: int = 1
) -> None:
    """Write pictures [N, 3, H, W] in rows, each with its text below it."""
    lines, line = 2, 11
    side = images.shape[-1] * scale
    width, height = max(side, 90) + 4, side + lines * line + 6
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(to_pil(images), texts, strict=True)):
        left, top = i % columns * width, i // columns * height
        larger = image.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(larger, (left + (width - side) // 2, top))
        for k, words in enumerate(textwrap.wrap(text, width // 6)[:lines]):
            place = left + width // 2, top + side + line * k
            pen.text(place, words, "black", anchor="ma", font_size=10)
    sheet.save(file, optimize=True)


def rows(file: Path, images: Tensor, scale: int = 1) -> None:
    """Write pictures [R, N, 3, H, W] as R rows of N."""
    grid(images.flatten(0, 1), images.shape[1], scale).save(file, optimize=True)


def inpainting(pipe: StableDiffusion, file: Path, **options: Any) -> None:
    """Draw pictures, then the right half of each anew by another prompt."""
    options["output"] = "tensor"
    first = pipe([before for before, _ in SWAPS], **options).images
    assert isinstance(first, Tensor)
    mask = torch.zeros(1, *first.shape[2:])
    mask[..., first.shape[3] // 2 :] = 1
    after = [after for _, after in SWAPS]
    again = pipe(after, image=first, mask=mask, seed=50, **options).images
    texts = [before for before, _ in SWAPS] + [f"right half: {words}" for words in after]
    labelled(file, torch.cat((first, again)), texts, len(SWAPS), 2)


def image_to_image(pipe: StableDiffusion, file: Path, **options: Any) -> None:
    """One picture made into others, from left to right by prompt, from top to bottom more."""
    options["output"] = "tensor"
    start = pipe("a red apple", **options).images
    assert isinstance(start, Tensor)
    images, texts = [start, *[torch.ones_like(start)] * (len(VARIATIONS) - 1)], ["a red apple"]
    texts += [""] * (len(VARIATIONS) - 1)
    for strength in STRENGTHS:
        for words in VARIATIONS:
            images.append(pipe(words, image=start, strength=strength, seed=7, **options).images)
            texts.append(f"{words}, strength {strength}")
    labelled(file, torch.cat(images), texts, len(VARIATIONS), 2)
