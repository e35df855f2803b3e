"""Shapes that images of any aspect ratio are trained in, all of about the same area.

The idea is that of NovelAI's aspect ratio bucketing: an image is scaled until it covers the shape
that fits it best, and what stands over is cut off.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Size = tuple[int, int]  # height, width


def shapes(resolution: int, step: int) -> list[Size]:
    """Heights and widths of at most ``resolution`` squared pixels, from 1 : 4 to 4 : 1.

    Args:
        resolution: side of the square of the largest area.
        step: what sides are multiples of.
    """
    area, least, most = resolution**2, max(resolution // 2, step), 2 * resolution
    found = {(resolution // step * step,) * 2}
    for width in range(-(-least // step) * step, most + 1, step):
        height = min(area // width, most) // step * step
        if height >= step:
            found |= {(height, width), (width, height)}
    return sorted(found)


@dataclass(frozen=True)
class Fit:
    """How an image becomes one of a shape: scaled to ``scaled``, and cut to ``shape``.

    Attributes:
        shape: height and width of the result.
        scaled: height and width of the whole image before it is cut.
    """

    shape: Size
    scaled: Size

    @property
    def cut(self) -> int:
        """Rows or columns that are cut off."""
        return max(self.scaled[0] - self.shape[0], self.scaled[1] - self.shape[1])

    def corner(self, at_random: bool = False) -> Size:
        """Top and left of what is kept: the middle, or drawn from :mod:`random`."""
        spare = [whole - kept for whole, kept in zip(self.scaled, self.shape, strict=True)]
        top, left = (random.randint(0, one) if at_random else one // 2 for one in spare)
        return top, left


def fit(size: Size, shape: Size) -> Fit:
    """An image of ``size`` scaled until it covers ``shape``."""
    (height, width), (wanted_height, wanted_width) = size, shape
    if height * wanted_width >= width * wanted_height:  # it is as tall as the shape, or taller
        scaled = max(wanted_height, round(height * wanted_width / width)), wanted_width
    else:
        scaled = wanted_height, max(wanted_width, round(width * wanted_height / height))
    return Fit(shape, scaled)


def best_fit(size: Size, among: list[Size]) -> Fit:
    """The shape that the least is cut off for; of equals the larger one."""
    return min(
        (fit(size, shape) for shape in among), key=lambda f: (f.cut, -f.shape[0] * f.shape[1])
    )
