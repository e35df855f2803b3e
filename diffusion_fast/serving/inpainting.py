"""What AUTOMATIC1111's web UI does around the drawing of a masked part of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageChops, ImageFilter, ImageStat

Box = tuple[int, int, int, int]  # left, top, right, bottom
_RADII = (64, 16, 4)  # of the colors that fill what is masked, from far to near


@dataclass(frozen=True)
class Masked:
    """A picture of which a part is drawn anew.

    Attributes:
        original: the whole picture, RGB.
        mask: of its size: white where it is drawn, grey at the soft edge.
        box: the part of it that the model sees.
        image: that part, as the model is to get it.
    """

    original: Image.Image
    mask: Image.Image
    box: Box
    image: Image.Image

    @property
    def inputs(self) -> dict[str, Any]:
        """``image`` and ``mask`` for the pipeline."""
        return {"image": self.image, "mask": self.mask.crop(self.box)}

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The whole picture: what was drawn, and the original's own pixels elsewhere."""
        size = self.box[2] - self.box[0], self.box[3] - self.box[1]
        whole = self.original.copy()
        whole.paste(drawn.resize(size, Image.Resampling.LANCZOS), self.box[:2])
        made = Image.composite(whole, self.original, self.mask)
        made.info.update(drawn.info)
        return made


def masked(
    image: Image.Image,
    mask: Image.Image,
    *,
    size: tuple[int, int] | None,
    blur: tuple[float, float],
    fill: bool,
    only: bool,
    padding: int,
) -> Masked:
    """A picture and a mask of its size, made ready.

    Args:
        image: RGB.
        mask: grey; halves and more are white, which is drawn.
        size: height and width of what the model draws; None for those of the picture.
        blur: pixels of the mask's soft edge, across and down.
        fill: whether colors from around take the place of what is masked.
        only: whether the model sees the masked part alone, at the whole size. The result has the
            picture's size then, and ``size`` without it.
        padding: pixels around that part.
    """
    mask = mask.point([0] * 128 + [255] * 128)
    height, width = (image.height, image.width) if size is None else size
    if not only and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    hard = mask
    if any(blur):
        mask = mask.filter(ImageFilter.GaussianBlur(blur))
    box = (0, 0, *image.size)
    if only:
        box = _around(mask.getbbox() or box, padding, width / height, image.size)
    shown = _filled(image, hard) if fill else image
    return Masked(image, mask, box, shown.crop(box))


def _around(box: Box, padding: int, ratio: float, size: tuple[int, int]) -> Box:
    """A box with a margin, grown to a ratio of width to height as far as the picture reaches."""
    left, top = max(0, box[0] - padding), max(0, box[1] - padding)
    right, bottom = min(size[0], box[2] + padding), min(size[1], box[3] + padding)
    wide, high = right - left, bottom - top
    left, right = _grown(left, right, max(wide, round(high * ratio)), size[0])
    top, bottom = _grown(top, bottom, max(high, round(wide / ratio)), size[1])
    return left, top, right, bottom


def _grown(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """An interval of that length about the same middle, moved and cut to lie in [0, most]."""
    length = min(length, most)
    first = min(max(0, (first + last - length) // 2), most - length)
    return first, first + length


def _filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with colors from around where the mask is white."""
    known = ImageChops.invert(mask)
    if known.getbbox() is None:
        return Image.new("RGB", image.size, (127, 127, 127))
    mean = [round(value) for value in ImageStat.Stat(image, known).mean]
    base = Image.new("RGBA", image.size, (*mean, 255))
    seen = image.copy()
    seen.putalpha(known)
    for radius in _RADII:  # of premultiplied colors, so that unknown ones have no weight
        near = seen.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        base.alpha_composite(near)
    base.alpha_composite(seen)
    return base.convert("RGB")
