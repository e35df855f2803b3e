"""Pictures that come in and go out: one decoder with limits, one encoder, files that expire."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import threading
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..images import PARAMETERS, read_picture
from .limits import FieldError, Limits

FORMATS = ("PNG", "JPEG", "WEBP")  # that are read
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def from_base64(field: str, text: str, limits: Limits) -> Image.Image:
    """A picture in base64, with or without ``data:image/...;base64,`` before it.

    Raises:
        FieldError: anything else; a URL is not opened.
    """
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise FieldError(field, "expected a picture in base64, got a text with a comma")
    try:
        data = base64.b64decode(rest if comma else text, validate=True)
    except (binascii.Error, ValueError):
        raise FieldError(field, f"expected a picture in base64, got {text[:20]!r}") from None
    return from_bytes(field, data, limits)


def from_bytes(field: str, data: bytes, limits: Limits) -> Image.Image:
    """A picture of one of :data:`FORMATS`, loaded, in RGBA where it is transparent, else RGB.

    Raises:
        FieldError: another file, a damaged one, or one of too many pixels, which is not decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
                if width * height > limits.picture_pixels:
                    got = f"{width} x {height}"
                    expected = f"at most {limits.picture_pixels} pixels"
                    raise FieldError(field, f"expected a picture of {expected}, got {got}")
                clear = file.has_transparency_data
                alpha = file.convert("RGBA").getchannel("A") if clear else None
                picture = read_picture(file)
    except FieldError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly any class
        kinds = ", ".join(FORMATS)
        why = f"expected a picture ({kinds}), got {len(data)} bytes that can't be read as one"
        raise FieldError(field, why) from error
    if alpha is not None and alpha.size == picture.size:
        picture.putalpha(alpha)
    return picture


def encoded(image: Image.Image, kind: str = "png", quality: int = 95) -> bytes:
    """A file of a picture, with its settings as text in it.

    Args:
        image: its ``info["parameters"]`` is that text.
        kind: one of :data:`TYPES`.
        quality: of JPEG and WebP, from 0 to 100.
    """
    text = image.info.get(PARAMETERS, "")
    stream = io.BytesIO()
    if kind == "png":
        info = PngInfo()
        if text:
            info.add_itxt(PARAMETERS, text)
        image.save(stream, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
        image.save(stream, kind.upper(), quality=quality, exif=exif)
    return stream.getvalue()


@dataclass(frozen=True)
class File:
    """A file that can be fetched for a while."""

    data: bytes
    type: str
    until: float


class Files:
    """Pictures under names that nobody can guess, bounded in number, bytes and time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._files: OrderedDict[str, File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def add(self, data: bytes, type: str) -> str:
        """Keep a file; the oldest ones make way.

        Returns:
            Its name.
        """
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._files[name] = File(data, type, time.monotonic() + self.limits.file_seconds)
            self._forget()
        return name

    def get(self, name: str) -> File | None:
        with self._lock:
            self._forget()
            return self._files.get(name)

    def _forget(self) -> None:
        now, limits = time.monotonic(), self.limits
        while self._files:
            name, oldest = next(iter(self._files.items()))
            size = sum(len(file.data) for file in self._files.values())
            if (
                oldest.until > now
                and len(self._files) <= limits.files
                and size <= limits.file_bytes
            ):
                return
            del self._files[name]
