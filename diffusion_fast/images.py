"""Pictures: read in whatever mode they have, made of tensors, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import AnyPath, whole
from .models import contents
from .ops import checks

SETTINGS = "diffusion_fast"  # the PNG text chunk that holds the settings as JSON
PARAMETERS = "parameters"  # the one that holds them as AUTOMATIC1111's web UI writes them
FORMATS = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_ORIENTATION = 0x0112  # EXIF tag
_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF tags
BETWEEN = 64  # the grey between the images of a grid
LINE = 14  # pixels of a line of headings
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags


def read_picture(
    source: Image.Image | AnyPath, mode: str = "RGB", background: str = "white"
) -> Image.Image:
    """A picture upright (EXIF) and in 8 bits a channel, whatever its file has.

    16-bit grey is scaled to 8 bits. Of several frames, the first one is read.

    Args:
        source: a PIL image, or a file of any format that Pillow knows by its first bytes.
        mode: ``"RGB"``, or ``"L"`` for grey.
        background: color that shows where the picture is transparent.

    Raises:
        ValueError: no picture, a damaged one, or one without a known range of values (float and
            32-bit integers). The message gives the reason alone; the caller names the file.
    """
    try:
        if isinstance(source, Image.Image):
            return _eight_bits(source, mode, background)
        with Image.open(source) as file:
            return _eight_bits(file, mode, background)
    except Exception as error:  # damaged files make Pillow raise nearly any class
        raise ValueError(f"can't be read as an image: {_reason(source, error)}") from error


def picture_size(path: AnyPath) -> tuple[int, int]:
    """Height and width of a picture upright; its header alone is read.

    Raises:
        ValueError: no picture. The message gives the reason alone; the caller names the file.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # as above
        raise ValueError(f"can't be read as an image: {_reason(path, error)}") from error
    return (width, height) if turned else (height, width)


def _eight_bits(image: Image.Image, mode: str, background: str) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    sixteen = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")  # which have no more bits
    )
    if image.mode in ("I", "F") and not sixteen:
        kind = {"I": "32-bit integers", "F": "floating point numbers"}[image.mode]
        raise ValueError(f"its mode is {image.mode!r} ({kind} of no known range); use 8 or 16 bits")
    clear = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if sixteen:
        values = np.asarray(image).astype(np.float64)
        grey = (values * (255 / (2 ** tags.get(_BITS, (16,))[0] - 1))).round()
        if tags.get(_PHOTOMETRIC) == 0:  # white is 0
            grey = 255 - grey
        alpha = np.where(values == clear, 0, 255) if isinstance(clear, int) else 255 + 0 * grey
        image = Image.fromarray(np.stack((grey, alpha), -1).astype(np.uint8), "LA")
    if image.mode == "La":  # multiplied by its alpha
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(mode)


def _reason(source: Image.Image | AnyPath, error: Exception) -> str:
    """Why a picture can't be read, by the first bytes of its file where they tell more."""
    if (isinstance(error, OSError) and error.strerror) or isinstance(source, Image.Image):
        return str(error)
    with open(source, "rb") as file:
        head = file.read(contents.HEAD)
    kind = contents.by_bytes(head) if head else "an empty file"
    return str(error) or type(error).__name__ if kind in (None, "a picture") else f"it is {kind}"


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255, clipped, on the CPU; a GPU converts, and sends bytes."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_pil(x: Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [-1, 1] with 1 or 3 channels, as PIL images.

    Raises:
        ValueError: another number of channels or dimensions.
    """
    _check_images(x)
    arrays = to_uint8(x.permute(0, 2, 3, 1).contiguous()).numpy()
    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]


def grid(
    x: Tensor, columns: int, scale: int = 1, gap: int = 2, headings: Sequence[str] = ()
) -> Image.Image:
    """Images in rows, left to right.

    Args:
        x: [N, C, H, W] in [-1, 1] with 1 or 3 channels.
        columns: images per row.
        scale: pixels per pixel.
        gap: pixels between images.
        headings: a text for each column, in a line above the images; none by default.

    Raises:
        ValueError: another number of channels, dimensions or headings.
    """
    _check_images(x)
    checks.positive_int("columns", columns)
    checks.positive_int("scale", scale)
    if len(headings) not in (0, columns):
        checks.fail("headings", f"none, or one for each of {columns} columns", len(headings))
    pixels = to_uint8(x).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, channels, height, width = pixels.shape
    rows, line = -(-count // columns), LINE if headings else 0
    canvas = torch.full(
        (channels, line + rows * (height + gap) + gap, columns * (width + gap) + gap),
        BETWEEN,
        dtype=torch.uint8,
    )
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[:, line + top : line + top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array.squeeze(-1) if channels == 1 else array)
    draw = ImageDraw.Draw(picture)
    for i, heading in enumerate(headings):
        draw.text((gap + i * (width + gap), gap), heading, fill="white")
    return picture


def file_format(path: AnyPath) -> str:
    """The format that a file's suffix asks for: ``"PNG"`` (also none), ``"JPEG"`` or ``"WEBP"``.

    Raises:
        ValueError: another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(filter(None, FORMATS))
        raise ValueError(f"expected a name of PNG, JPEG or WebP ({known}), got {path}")
    return FORMATS[suffix]


def save_picture(image: Image.Image, path: AnyPath, settings: Mapping[str, Any] | None) -> None:
    """Write a picture that carries what made it; a full disk leaves no broken file behind.

    Args:
        image: the picture. A text ``image.info["parameters"]``, such as that of
            :func:`~diffusion_fast.pipelines.infotext.infotext`, is written as other programs do.
        path: the file; its suffix decides the format.
        settings: JSON types; None writes neither settings nor text.

    Raises:
        ValueError: another suffix, settings that are too long for the format.
        OSError: the file can't be written.
    """
    kind = file_format(path)
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 95}
    if settings is not None:
        options |= _carried(kind, json.dumps(dict(settings)), image.info.get(PARAMETERS, ""))
    try:
        with whole(path) as [temporary]:
            image.save(temporary, format=kind, **options)
    except ValueError as error:  # EXIF has at most 64 KiB in a JPEG
        raise ValueError(f"{path}: can't hold its settings ({error}); a PNG can") from error


def _carried(kind: str, settings: str, text: str) -> dict[str, Any]:
    """Keywords that make Pillow write settings and text: chunks of a PNG, EXIF of the others."""
    if kind == "PNG":
        info = PngInfo()
        info.add_text(SETTINGS, settings)
        if text:
            info.add_itxt(PARAMETERS, text)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[_DESCRIPTION] = settings
    if text:
        exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + text.encode("utf-16-be")}
    return {"exif": exif}


def read_settings(path: AnyPath) -> dict[str, Any]:
    """What :func:`save_picture` wrote into a file.

    Raises:
        ValueError: no picture, or one without settings.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(SETTINGS) or image.getexif().get(_DESCRIPTION)
            settings = json.loads(text) if text else None
    except Exception as error:  # damaged files make Pillow raise nearly any class
        message = f"{path}: expected a picture that carries its settings"
        raise ValueError(f"{message}, got {type(error).__name__}: {error}") from error
    if not isinstance(settings, dict):
        checks.fail(str(path), "a picture that carries its settings, a JSON object", settings)
    return settings


def _check_images(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not len(x):
        checks.fail("x", "shape [N, C, H, W] with C = 1 or 3 and N > 0", list(x.shape))
