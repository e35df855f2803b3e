"""The data set: some 600 emoji in three styles, 64 x 64 on white, with names and keywords.

    python examples/emoji/make_data.py [--out build/emoji]

Pictures and names come from npm packages (``packages.py``), so Node.js must be there, and
``pip install resvg-py`` for the SVGs. Run again after an interruption, it makes what is missing.
``metadata.jsonl`` describes the pictures as ``training.ImageFolder`` reads them. Faces are thinned
out; flags, skin tones, clocks, letters and most people are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from captions import STYLES, Picture, dominant_color
from packages import fetch
from PIL import Image

from diffusion_fast.files import whole

SIZE, MARGIN = 64, 3
MOST_WORDS = 2
KINDS = {
    "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine",
    "animal-bug", "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared",
    "food-asian", "food-sweet", "drink", "place-building", "place-geographic", "place-other",
    "transport-ground", "transport-water", "transport-air", "sky & weather", "sport", "event",
    "musical-instrument", "clothing", "tool", "light & video", "computer", "phone", "cat-face",
    "face-smiling", "face-costume", "face-glasses", "monkey-face", "heart", "science", "game",
}  # fmt: skip
UNWANTED = (" moon", "button", "sign", "oncoming", " with ", " and ", "service dog", "guide dog",
            "japanese", "dusk", "cloud ", "locked", "arrival", "departure")  # fmt: skip


class Sources:
    """The unpacked packages, and from them the picture of an emoji in a style."""

    def __init__(self, folder: Path) -> None:
        noto = fetch("emoji-datasource-google", folder)
        flat = fetch("@iconify-json/fluent-emoji-flat", folder)
        self._3d = fetch("@lobehub/fluent-emoji-3d", folder) / "assets"
        self.emoji = json.loads((noto / "emoji.json").read_text())
        self._noto = noto / "img" / "google" / "64"
        self._icons = json.loads((flat / "icons.json").read_text())["icons"]
        self._flat = json.loads((flat / "chars.json").read_text())
        self.words: dict[str, Any] = {}
        for package, kind in (
            ("cldr-annotations-full", "annotations"),
            ("cldr-annotations-derived-full", "annotationsDerived"),
        ):
            file = fetch(package, folder) / kind / "en" / "annotations.json"
            self.words |= json.loads(file.read_text())[kind]["annotations"]

    def drawings(self, emoji: dict[str, Any]) -> dict[str, Callable[[], Image.Image]] | None:
        """A function for each style that draws with transparency; None if a style lacks it."""
        code = emoji["unified"].lower()
        noto = self._noto / f"{code}.png"
        solid = self._3d / f"{code}.webp"
        name = self._flat.get(code) or self._flat.get(code.replace("-fe0f", ""))
        if not noto.is_file() or not solid.is_file() or name not in self._icons:
            return None
        return {
            "noto": lambda: Image.open(noto),
            "flat": lambda: drawing_of(self._icons[name]["body"]),
            "3d": lambda: Image.open(solid),
        }


def drawing_of(body: str, side: int = 32) -> Image.Image:
    """What is in an SVG of so many units, with transparency."""
    import resvg_py

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE)))


def on_white(drawing: Image.Image) -> Image.Image:
    """What is drawn, as large as fits within the margin, in the middle of a white square."""
    image = drawing.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = (SIZE - 2 * MARGIN) / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    image = image.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE), "white")
    square.alpha_composite(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return square.convert("RGB")


def wanted(sources: Sources) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """The emoji to draw and their keywords, by name."""
    found = {}
    for emoji in sorted(sources.emoji, key=lambda one: one["sort_order"]):
        code = emoji["unified"]
        character = "".join(chr(int(part, 16)) for part in code.split("-"))
        entry = sources.words.get(character) or sources.words.get(character.replace("\ufe0f", ""))
        if emoji["subcategory"] not in KINDS or not entry or "tts" not in entry:
            continue
        name = entry["tts"][0].lower().replace("’", "'").replace("-", " ")
        few = len(name.split()) <= MOST_WORDS
        if few and name not in found and not any(word in f"{name} " for word in UNWANTED):
            keywords = tuple(w.lower() for w in entry.get("default", ()) if len(w.split()) <= 2)
            found[name] = emoji, keywords[:8]
    return found


def make(out: Path) -> list[Picture]:
    """Make what is missing in the folder of the data set; all its pictures."""
    sources = Sources(out / "packages")
    data = out / "data"
    (data / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (emoji, keywords) in wanted(sources).items():
        drawings = sources.drawings(emoji)
        if drawings is None:
            continue
        for style in STYLES:
            file = data / "pictures" / f"{name.replace(' ', '_')}-{style}.png"
            if not file.is_file():
                with whole(file) as (temporary,):
                    on_white(drawings[style]()).save(temporary, "png")
            content = file.read_bytes()
            color, hue = dominant_color(np.asarray(Image.open(io.BytesIO(content))))
            digest = hashlib.sha256(content).hexdigest()
            place = f"pictures/{file.name}"
            pictures.append(Picture(place, name, keywords, style, color, hue, digest))
    lines = [
        json.dumps({**vars(picture), "text": f"{picture.name}, {picture.style} style"})
        for picture in pictures
    ]
    with whole(data / "metadata.jsonl") as (temporary,):
        temporary.write_text("\n".join(lines) + "\n")
    return pictures


def load(out: Path) -> tuple[list[Picture], np.ndarray]:
    """The data set and its pixels [N, 64, 64, 3].

    Raises:
        ValueError: a picture is not the one that was made; FileNotFoundError: it is missing.
    """
    data, pictures, pixels = out / "data", [], []
    for line in (data / "metadata.jsonl").read_text().splitlines():
        values = json.loads(line)
        del values["text"]
        picture = Picture(**values | {"keywords": tuple(values["keywords"])})
        content = (data / picture.file_name).read_bytes()
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise ValueError(f"{picture.file_name}: changed since make_data.py made it")
        pictures.append(picture)
        pixels.append(np.asarray(Image.open(io.BytesIO(content))))
    return pictures, np.stack(pixels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/emoji"), help="folder to work in")
    made = make(parser.parse_args().out)
    digest = hashlib.sha256("".join(picture.sha256 for picture in made).encode()).hexdigest()
    print(f"{len(made)} pictures of {len(made) // len(STYLES)} names, all together {digest[:16]}")
