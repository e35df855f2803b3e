"""``diffusion-fast vae-check``: how much of an image survives an autoencoder."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..files import visible_files
from ..images import read_picture, to_uint8
from ..models import vae_memory
from ..models.autoencoder import Autoencoder
from ..models.vae import AutoencoderKL
from ..ops import checks
from ..pipelines import StableDiffusion
from ..pipelines.loading import TINY
from ..training.image_folder import SUFFIXES
from .common import check_device


def vae_check(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    model: Annotated[
        str,
        typer.Option(
            help="The folder of an autoencoder or of a pipeline, a single file, a hub id, or tiny"
            " (random weights)."
        ),
    ],
    size: Annotated[
        int | None,
        typer.Option(
            help="Scale images until they cover a square of this side and cut them at the middle;"
            " by default only to multiples of what the model needs (8 for Stable Diffusion).",
            min=1,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda ...")] = "cpu",
) -> None:
    """Show the PSNR of images encoded and decoded again: no model draws better than its VAE.

    In decibels, 10 log10(255^2 / MSE) over the 8-bit pixels; more is better, "inf" is no loss.
    """
    check_device(device)
    files = _files(images)
    vae = _autoencoder(model, device)
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels != (3, 3):
        checks.fail("--model", "an autoencoder of 3 channels", f"{channels[0]} and {channels[1]}")
    if size is not None and size % vae.downsampling:
        checks.fail("--size", f"a multiple of {vae.downsampling}", size)
    for file in files:  # all of them, before the long computation
        _read(file, size, vae.downsampling)
    table = Table("image", "size", "PSNR (dB)", "computed", title=model, title_justify="left")
    results = []
    progress = Console(stderr=True)
    for file in track(files, "vae-check", console=progress, disable=not sys.stderr.isatty()):
        pixels = _read(file, size, vae.downsampling)
        psnr, how = _round_trip(vae, pixels, file)
        results.append(psnr)
        shape = f"{pixels.shape[2]} x {pixels.shape[1]}"
        table.add_row(str(file), shape, f"{psnr:.2f}", how)
    table.add_section()
    table.add_row("mean", "", f"{sum(results) / len(results):.2f}", "")
    Console().print(table)


def _autoencoder(model: str, device: str) -> Autoencoder:
    if model not in TINY:
        return AutoencoderKL.from_pretrained(model, device=device)
    typer.echo(f"{model}: random weights, so the figures show nothing", err=True)
    return StableDiffusion.from_pretrained(model, device=device).vae


def _files(paths: list[Path]) -> list[Path]:
    """The images named, and those in the folders named."""
    files = []
    for path in paths:
        if not path.exists():
            checks.fail("IMAGES", "images or folders", f"{path}, which does not exist")
        found = [path]
        if path.is_dir():
            found = visible_files(path, SUFFIXES)
            if not found:
                checks.fail("IMAGES", f"images ({' '.join(SUFFIXES)}) in {path}", "none")
        files += found
    return files


def _read(path: Path, size: int | None, grain: int) -> Tensor:
    """An image as uint8 [3, H, W], its height and width multiples of ``grain``."""
    try:
        image = read_picture(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    width, height = (side // grain * grain for side in image.size)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    elif width and height:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:
        checks.fail(
            str(path), f"at least {grain} x {grain} pixels", f"{image.width} x {image.height}"
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _round_trip(vae: Autoencoder, pixels: Tensor, path: Path) -> tuple[float, str]:
    """PSNR in dB of uint8 [3, H, W] through the model, and how memory allowed it."""
    weight = vae.weight
    x = (pixels[None].float() / 127.5 - 1).to(weight)
    encoded = vae_memory.encode(vae, x)
    decoded = vae_memory.decode(vae, encoded.latents.mode())
    if not decoded.images.isfinite().all():
        raise ArithmeticError(f"{path}: the model decodes to values that are not finite")
    error = to_uint8(decoded.images[0]).double() - pixels.double()
    mse = error.square().mean().item()
    how = encoded.how if encoded.how == decoded.how else f"{encoded.how}, then {decoded.how}"
    return 10 * math.log10(255**2 / mse) if mse else math.inf, how
