"""The figures of an evaluation as JSON and as a page of tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AIMS = {"training captions": 0.8, "composed: both": 0.5}
PAGE = """# The emoji model

Made by `python examples/emoji/evaluate.py`. 200 training captions are judged among 100 names drawn
by seed. 50 composed captions join a color and an object that were never trained on together: the
object is judged among 100 names by a network that goes by shape, the color by the dominant hue. The
judges have only seen real pictures. All pictures took {steps} steps of the model's own sampler;
few steps, inpainting and image-to-image are at guidance {best:g}, the best for training captions.

## By guidance

{guidance}
{aims}

Distances are root mean squares of colors in [0, 1] at 16 x 16 pixels. "Spread" is that of eight
pictures of one caption, "nearest" the median distance to the nearest picture that was trained on.
For comparison:

{distances}
Grids, the last three rows composed: {grids}.

## The judges on real pictures

{judges}
## What the autoencoder loses

{autoencoder}
![Real pictures above, decoded ones below: the worst, middling and best](autoencoder.png)

## Few steps

32 training captions; the distance is that of the latents to the same sampler's 1000-step solution
from the same noise, over their root mean square.

{few}
## Inpainting and image-to-image

![The right half drawn anew](inpainting.png)
![A picture made into others](image_to_image.png)
"""


def write_report(found: dict[str, Any], results: Path) -> None:
    """Write ``results.json`` and ``README.md`` beside the pictures."""
    (results / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (results / "README.md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """The page in Markdown."""
    by_guidance: dict[str, dict[str, float]] = found["guidance"]
    heads = ["guidance", *next(iter(by_guidance.values()))]
    rows = [
        [g, *(_figure(name, value) for name, value in values.items())]
        for g, values in by_guidance.items()
    ]
    grids = (f"[{g}](guidance_{g.replace('.', '_')}.png)" for g in by_guidance)
    few = [
        [sampler, steps, _distance(one["distance"]), f"{one['read as asked']:.1%}"]
        for sampler, by_steps in found["few steps"].items()
        for steps, one in sorted(by_steps.items(), key=lambda item: int(item[0]))
    ]
    return PAGE.format(
        steps=found["steps"],
        best=found["best guidance"],
        guidance=_table(heads, rows),
        aims=_reached(by_guidance),
        distances=_pairs("", "distance", found["distances"]),
        grids=", ".join(grids),
        judges=_pairs("judge", "share right", found["judges"]),
        autoencoder=_pairs("", "", found["autoencoder"]),
        few=_table(["sampler", "steps", "distance of latents", "read as asked"], few),
    )


def _reached(by_guidance: Mapping[str, Mapping[str, float]]) -> str:
    sentences = []
    for name, aim in AIMS.items():
        best = max(by_guidance, key=lambda g: by_guidance[g][name])
        value = by_guidance[best][name]
        word = "reached" if value >= aim else "missed"
        sentences.append(f"{name}: {value:.1%} at guidance {best}; the aim of {aim:.0%} is {word}.")
    return "\n".join(sentences)


def _figure(name: str, value: float) -> str:
    if "dB" in name:
        return f"{value:.1f}"
    words = ("spread", "nearest")
    return _distance(value) if any(word in name for word in words) else f"{value:.1%}"


def _distance(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _pairs(left: str, right: str, values: Mapping[str, float]) -> str:
    return _table([left, right], [[name, _figure(name, value)] for name, value in values.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
