"""What is said of pictures: names, styles, colors, and the captions that are frozen by seed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STYLES = ("noto", "flat", "3d")
# Hues in degrees: where a color begins and ends, and the hue that recolored pictures get.
HUES = {
    "red": (342, 16, 0),
    "orange": (16, 41, 30),
    "yellow": (41, 68, 52),
    "green": (72, 168, 120),
    "blue": (185, 250, 215),
    "purple": (250, 295, 274),
    "pink": (295, 342, 325),
}
COLORS = tuple(HUES)
_COLOR_WORDS = re.compile(rf"\b({'|'.join(COLORS)}|white|black|brown|gr[ae]y|light)\b ?")
LEAST_COLORED = 0.35  # share of a picture's foreground that must have a hue


@dataclass(frozen=True)
class Picture:
    """One line of ``metadata.jsonl``.

    Args:
        file_name: of the picture, below the folder of the data set.
        name: of the emoji, in lower case.
        keywords: other words for it.
        style: one of ``STYLES``.
        color: its dominant color, or None.
        hue: the dominant hue in degrees, None for pictures with too little color.
        sha256: of the file.
    """

    file_name: str
    name: str
    keywords: tuple[str, ...]
    style: str
    color: str | None
    hue: float | None
    sha256: str

    @property
    def bare(self) -> str:
        """The name without words of color."""
        return _COLOR_WORDS.sub("", self.name).strip() or self.name


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions_of(picture: Picture, count: int, rng: random.Random) -> list[str]:
    """Different captions of a picture as it is; all hold its name, or its color and bare name."""
    name, styled = picture.name, f", {picture.style} style"
    found = [f"{name}{styled}", name, article(name), f"{article(name)}{styled}"]
    if picture.color is not None:
        colored = article(f"{picture.color} {picture.bare}")
        found += [colored, f"{colored}{styled}"]
    words = [word for word in picture.keywords if word != name]
    rng.shuffle(words)
    found += [f"{name}, {word}{styled}" for word in words[:2]]
    found += [f"{word}, {name}" for word in words[2:4]]
    while len(found) < count:
        found.append(found[len(found) % 4])
    return found[:count]


def colored_caption(color: str, picture: Picture, rng: random.Random) -> str:
    """A caption for a copy of a picture in another color."""
    caption = article(f"{color} {picture.bare}")
    return caption + rng.choice(("", f", {picture.style} style"))


def hsv(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
    """Hue in degrees, saturation and value in [0, 1], of pixels [..., 3]."""
    x = rgb.astype(np.float32) / 255
    value, least = x.max(-1), x.min(-1)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    hue = np.select(
        [value == r, value == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4
    )
    hue = np.where(chroma > 0, 60 * hue, 0).astype(np.float32)
    return hue, chroma / np.where(value > 0, value, 1), value


def dominant_color(rgb: NDArray[np.uint8]) -> tuple[str | None, float | None]:
    """The color word and the hue of most of what is not background, judged by pixels alone.

    Args:
        rgb: a picture on white, [H, W, 3].

    Returns:
        The color with the largest share of the colored pixels if that is more than half, and its
        mean hue; a hue without a word for dull or mixed ones; None, None for colorless pictures.
    """
    hue, saturation, value = hsv(rgb)
    foreground = (rgb.min(-1) < 240).sum()
    colored = (saturation > 0.25) & (value > 0.2)
    if not foreground or colored.sum() < LEAST_COLORED * foreground:
        return None, None
    weight = saturation[colored] * value[colored]
    bins = np.bincount((hue[colored] // 10).astype(int), weight, 36)
    smooth = bins + np.roll(bins, 1) + np.roll(bins, -1)
    middle = 10 * int(smooth.argmax()) + 5
    away = (hue[colored] - middle + 180) % 360 - 180
    near = np.abs(away) <= 25
    mean = float((middle + np.average(away[near], weights=weight[near])) % 360)
    if weight[near].sum() <= 0.5 * weight.sum():
        return None, mean
    if within(mean, (0, 45)) and np.average(value[colored][near]) < 0.6:
        return "brown", mean
    return next((word for word in COLORS if within(mean, HUES[word])), None), mean


def within(hue: float, span: Sequence[float]) -> bool:
    """Whether a hue lies in a span of degrees, which may cross 0."""
    return (hue - span[0]) % 360 <= (span[1] - span[0]) % 360


def rotated(rgb: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """Pixels [..., 3] with their hues turned; saturation and value stay."""
    hue, saturation, value = hsv(rgb)
    k = (np.array([5, 3, 1]) + ((hue + degrees) % 360)[..., None] / 60) % 6
    ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
    x = value[..., None] * (1 - saturation[..., None] * ramp)
    return (255 * x + 0.5).astype(np.uint8)


def recolored(rgb: NDArray[np.uint8], hue: float, color: str) -> NDArray[np.uint8]:
    """A picture whose dominant hue is now that of a color."""
    return rotated(rgb, HUES[color][2] - hue)


# Frozen before the first sample was drawn: changing these seeds makes another experiment.
def composed(pictures: Sequence[Picture], count: int = 50, seed: int = 1) -> list[tuple[str, str]]:
    """Pairs of color and bare name that training never sees, drawn by seed.

    Only names whose pictures have one dominant color in all styles, none of them near the color
    asked for; and the pair as words is no name or keyword.
    """
    by_name: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_name.setdefault(picture.name, []).append(picture)
    known = {word for picture in pictures for word in (picture.name, *picture.keywords)}
    rng = random.Random(seed)
    fits = [
        name
        for name, group in sorted(by_name.items())
        if len(group) == len(STYLES)
        and all(picture.color is not None for picture in group)
        and len(name.split()) <= 2
        and group[0].bare == name
    ]
    pairs = []
    for name in rng.sample(fits, count):
        far = [
            color
            for color in COLORS
            if all(not _close(picture, color) for picture in by_name[name])
            and f"{color} {name}" not in known
        ]
        pairs.append((rng.choice(far), name))
    return pairs


def _close(picture: Picture, color: str) -> bool:
    """Whether a picture has a color, or nearly."""
    assert picture.hue is not None
    return abs((picture.hue - HUES[color][2] + 180) % 360 - 180) < 40


def judged_names(names: Sequence[str], count: int = 100, seed: int = 2) -> list[str]:
    """The names among which pictures are told apart, drawn by seed."""
    return sorted(random.Random(seed).sample(sorted(names), count))
