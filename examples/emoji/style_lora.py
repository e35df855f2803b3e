"""Teaches the emoji model a style by twenty pictures, and judges it on names that it wasn't shown.

    python examples/emoji/style_lora.py [--out build/emoji] [--results benchmarks/results/finetune]

The style is that of Noto Emoji before 2017 (npm ``@iconify-json/noto-v1``), which the model has
never seen. The twenty names are drawn by seed among those that are not judged. A style classifier
(its training has seen no picture of a judged name) says which of four styles a picture has, and the
judge of names what it shows. For comparison the base's own pictures are judged, and these with the
colors of the style: a tint alone must not pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import judges
import numpy as np
import pictures as drawn
import torch
from captions import STYLES, Picture, judged_names
from make_data import drawing_of, load, on_white
from packages import fetch
from PIL import Image
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.files import write_json

STYLE = "classic"
SHOWN, EACH = 20, 2  # pictures to learn from; pictures drawn of each name
TRAINING: dict[str, Any] = {
    "rank": 16,
    "targets": ("all",),
    "train_text": True,
    "steps": 600,
    "batch_size": 10,
    "learning_rate": 5e-4,
    "decay": "cosine",
    "buckets": False,
    "bucket_step": 8,
    "caption_dropout": 0.1,
    "ema_decay": 0.99,
    "checkpoint_every": 600,
}
DRAWING: dict[str, Any] = {"steps": 25, "guidance_scale": 2.0, "output": "tensor"}
PAGE = """# A style in twenty pictures

Made by `python examples/emoji/style_lora.py` on {date} ({machine}, {threads} threads), in
{minutes:.1f} minutes of training. A LoRA of rank {rank} for all layers of the
[emoji model](../emoji/README.md) learned the style of Noto Emoji before 2017 from twenty pictures
({names}), "NAME, {style} style".

{count} other names were each drawn {each} times, with and without it from the same noise. "Read as
{style}" is the share that a classifier of the styles {styles} puts there, "read as its name" the
share that the judge of 100 names reads as asked. "With the style's colors": the base's pictures
with the mean and the spread that each color has in the real pictures of the style.

{table}
![Real pictures of names it wasn't shown; the base's; with the LoRA]({grid})

The twenty that it learned from:

![Twenty pictures]({shown})
"""


def old_pictures(names: Sequence[str], out: Path) -> dict[str, Image.Image]:
    """Those names' pictures in the style, as the data set has them; not all names have one."""
    package = fetch("@iconify-json/noto-v1", out / "packages")
    icons = json.loads((package / "icons.json").read_text())
    found = {}
    for name in names:
        icon = icons["icons"].get(name.replace(" ", "-").replace("'", ""))
        if icon is not None:
            found[name] = on_white(drawing_of(icon["body"], icons["width"]))
    return found


def caption(name: str) -> str:
    """What a picture in the style is called."""
    return f"{name}, {STYLE} style"


class Demonstration:
    """The data, the judges, and what they say.

    Args:
        out: the working folder, with the data set.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.pictures, self.pixels = load(out)
        everything = sorted({picture.name for picture in self.pictures})
        self.judged = judged_names(everything)
        self.old = old_pictures(everything, out)
        self.unseen = [name for name in self.judged if name in self.old]
        others = [name for name in self.old if name not in set(self.judged)]
        self.shown = sorted(random.Random(0).sample(others, SHOWN))

    def train(self) -> Path:
        """The LoRA's folder."""
        folder = self.out / "style" / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.shown:
            file = folder / f"{name.replace(' ', '_')}.png"
            self.old[name].save(file)
            file.with_suffix(".txt").write_text(caption(name))
        return df.finetune("emoji", folder, self.out / "style" / "lora", resume=True, **TRAINING)

    def style_judge(self) -> judges.Judge:
        """Tells the styles apart; has seen no judged name."""
        old = [Picture("", name, (), STYLE, None, None, "") for name in self.old]
        added = np.stack([np.asarray(image) for image in self.old.values()])
        pictures, pixels = [*self.pictures, *old], np.concatenate((self.pixels, added))
        left_out = {i for i, one in enumerate(pictures) if one.name in set(self.judged)}
        labelled = [replace(one, name=one.style) for one in pictures]
        styles, file = [*STYLES, STYLE], self.out / "judge-styles.pt"
        return judges.train_judge(labelled, pixels, styles, file, hues=False, left_out=left_out)

    def real(self, style: str) -> tuple[Tensor, list[str]]:
        """Real pictures of names that the LoRA wasn't shown, in a style; and the names."""
        if style == STYLE:
            pixels = np.stack([np.asarray(self.old[name]) for name in self.unseen])
            return judges.images_of(pixels), self.unseen
        chosen = {
            one.name: i
            for i, one in enumerate(self.pictures)
            if one.style == style and one.name in set(self.unseen)
        }
        return judges.images_of(self.pixels[list(chosen.values())]), list(chosen)

    def draw(self, pipe: df.StableDiffusion) -> Tensor:
        """EACH pictures of each name that the LoRA wasn't shown."""
        rounds = [
            pipe([caption(name) for name in self.unseen], seed=100 * (i + 1), **DRAWING).images
            for i in range(EACH)
        ]
        return torch.cat(rounds)

    def run(self, results: Path) -> dict[str, Any]:
        """Train, draw, judge; pictures go to ``results``."""
        results.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        lora = self.train()
        minutes = (time.perf_counter() - start) / 60
        pipe = df.StableDiffusion.from_pretrained("emoji", dtype=torch.float32)
        base = self.draw(pipe)
        pipe.loras.load(lora / "pytorch_lora_weights.safetensors", STYLE)
        changed = self.draw(pipe)
        styles = self.style_judge()
        names = judges.judge_of(
            "shape and color", self.pictures, self.pixels, self.judged, self.out
        )
        truth, _ = self.real(STYLE)
        rows = {f"real pictures, {style}": self.real(style) for style in (STYLE, *STYLES)}
        asked = self.unseen * EACH
        rows |= {
            "the base": (base, asked),
            "the base, with the style's colors": (tinted(base, truth), asked),
            "with the LoRA": (changed, asked),
        }
        found = {
            row: {
                "style": styles.share(images, [STYLE] * len(images)),
                "name": names.share(images, whose),
            }
            for row, (images, whose) in rows.items()
        }
        columns = range(0, len(self.unseen), max(1, len(self.unseen) // 16))
        grid = torch.stack([part[list(columns)] for part in (truth, base, changed)])
        drawn.rows(results / "style_lora.png", grid)
        shown = torch.cat([judges.images_of(np.asarray(self.old[n])[None]) for n in self.shown])
        drawn.rows(results / "style_lora_shown.png", shown.unflatten(0, (2, 10)))
        return {"minutes": minutes, "names": len(self.unseen), "shown": self.shown, "rows": found}


def tinted(images: Tensor, like: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] with the mean and the standard deviation that each channel of others
    has over all of them, where they are not white."""

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        drawn_on = (x.amin(1) < 0.88).flatten()
        flat = x.movedim(1, -1).flatten(0, 2)[drawn_on]
        return flat.mean(0).view(3, 1, 1), flat.std(0).view(3, 1, 1)

    (mean, spread), (new_mean, new_spread) = moments(images), moments(like)
    changed = ((images - mean) / spread * new_spread + new_mean).clamp(-1, 1)
    return torch.where(images.amin(1, keepdim=True) < 0.88, changed, images)


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["|  | read as " + STYLE + " | read as its name |", "| --- | ---: | ---: |"]
    for row, shares in found["rows"].items():
        lines.append(f"| {row} | {shares['style']:.1%} | {shares['name']:.1%} |")
    return PAGE.format(
        date=time.strftime("%Y-%m-%d"),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        minutes=found["minutes"],
        rank=TRAINING["rank"],
        names=", ".join(found["shown"]),
        style=STYLE,
        styles=", ".join((*STYLES, STYLE)),
        count=found["names"],
        each=EACH,
        table="\n".join(lines) + "\n",
        grid="style_lora.png",
        shown="style_lora_shown.png",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/emoji"), help="folder to work in")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/finetune"))
    options = parser.parse_args()
    made = Demonstration(options.out).run(options.results)
    write_json(made, options.results / "style_lora.json")
    (options.results / "style_lora.md").write_text(page(made))
    print((options.results / "style_lora.md").read_text())
