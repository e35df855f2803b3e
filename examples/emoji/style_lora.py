"""Teaches the emoji model a style by twenty pictures, and judges it on names that it wasn't shown.

    python examples/emoji/style_lora.py [--out build/emoji] [--results benchmarks/results/finetune]

The style is that of Noto Emoji before 2017 (npm ``@iconify-json/noto-v1``), which the model has
never seen. For each of three seeds twenty names are drawn among those that are not judged, a LoRA
is trained on their pictures, and the judged names are drawn. With the twenty alone the model
forgets what things look like (README.md has figures). So the LoRA is trained on the base's own
pictures of all other names too, painted in the main colors of the twenty.

A style classifier (its training has seen no picture of a judged name) says which of four styles a
picture has, and a judge of names (which has seen no picture of the style) what it shows. For
comparison the base's own pictures are judged, and these with the colors of the style: a tint alone
must not pass. How near the base comes to the styles that it was trained on shows what can be asked
of it. Run again after an interruption, it makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
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
from diffusion_fast import hardware
from diffusion_fast.files import whole, write_json
from diffusion_fast.images import to_pil
from diffusion_fast.training.tensor_store import fingerprint

# Settings are tried with seed 0 and on judged names that have no picture in the style.
STYLE, SEEDS, SHOWN = "v1", (1, 2, 3), 20
TRAINING: dict[str, Any] = {
    "rank": 64,
    "targets": ("all",),
    "steps": 900,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "decay": "cosine",
    "buckets": False,
    "bucket_step": 8,
    "flip": True,
    "caption_dropout": 0.1,
    "ema_decay": 0.98,
    "checkpoint_every": 300,
}
REPEATS, PAINTED = 2, 474  # of each of the twenty in a pass; pictures of the base beside them
DRAWING: dict[str, Any] = {"steps": 20, "guidance_scale": 2.0, "output": "tensor"}
STRENGTH = 0.9  # of the LoRA when it draws
WHITE = 0.88  # pixels whose channels are all above it are background
# What passes, for each seed. Half of what the autoencoder lets through, and of what the base has
# in the styles that it was trained on: twenty pictures show the style of few colors and things.
# Twice the tint's share: more than a tint. Names: of the base's.
OF_CEILING, OF_OWN, OF_TINT, OF_NAMES = 0.5, 0.5, 2.0, 0.8

PAGE = """# A style in twenty pictures

Made by `{command}` on {date} ({processor}; cores: {threads}). For each of
the seeds {seeds} a LoRA of the [emoji model](../emoji/README.md) learned the style of Noto Emoji
before 2017 from twenty pictures, "NAME, {style} style". Then {count} other names were drawn with
and without it from the same noise.
Settings are tried with another twenty and other names.

"Style" is the share of the pictures that a classifier of {styles} reads as {style}, "name" the
share that a judge of 100 names reads as asked, which has seen no picture of the style. "Real" and
"decoded" are the ceilings: real pictures, and those of the style after the autoencoder; "base,
noto" and the like are the base's pictures in a style that it was trained on, read as that style.
"Tint": the base's pictures with the mean and the spread that each color channel has in real
pictures of the style. "Palette": with the nearest of the twenty's {kept} most common colors in each
pixel, which shows that the classifier goes by colors above all. The LoRA was trained on the twenty
and on {painted} pictures by the base of other names, painted so: what it can have learned is above
all these colors, and which of them a thing gets.

{table}
{criteria}

Seed {first}: the base, the LoRA, and real pictures of the same names, which neither has seen:

![The base; the LoRA; real pictures]({grid})

The twenty that it learned from:

![Twenty pictures]({shown})
"""
COLORS_KEPT = 16  # of the twenty pictures, for the base's pictures painted in them

Shares = dict[str, float]  # read as the style, and as the name


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


def caption(name: str, style: str = STYLE) -> str:
    """What a picture in a style is called. The base draws "v1 style" much as "flat style"."""
    return f"{name}, {style} style"


def drawn_names(names: Sequence[str], judged: Sequence[str], seed: int) -> list[str]:
    """The names whose pictures the LoRA is shown, drawn by seed among those that aren't judged."""
    others = [name for name in names if name not in set(judged)]
    return sorted(random.Random(seed).sample(others, SHOWN))


class Demonstration:
    """The data, the judges, and what they say.

    Args:
        out: the working folder, with the data set.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        settings = [STYLE, TRAINING, REPEATS, PAINTED, DRAWING, STRENGTH]
        self.place = out / "style" / fingerprint({}, settings)[:12]  # other settings: another place
        self.pictures, self.pixels = load(out)
        everything = sorted({picture.name for picture in self.pictures})
        self.judged = judged_names(everything)
        self.old = old_pictures(everything, out)
        self.unseen = [name for name in self.judged if name in self.old]
        self.styles = self.style_judge()
        self.names = judges.judge_of(
            "shape and color", self.pictures, self.pixels, self.judged, out
        )

    def style_judge(self) -> judges.Judge:
        """Tells the styles apart; has seen no judged name."""
        old = [Picture("", name, (), STYLE, None, None, "") for name in self.old]
        added = np.stack([np.asarray(image) for image in self.old.values()])
        pictures, pixels = [*self.pictures, *old], np.concatenate((self.pixels, added))
        left_out = {i for i, one in enumerate(pictures) if one.name in set(self.judged)}
        labelled = [replace(one, name=one.style) for one in pictures]
        styles, file = [*STYLES, STYLE], self.out / "judge-styles.pt"
        return judges.train_judge(labelled, pixels, styles, file, hues=False, left_out=left_out)

    def judge(self, images: Tensor, names: Sequence[str], style: str = STYLE) -> Shares:
        """Shares of the pictures that are read as a style, and as their names."""
        found = self.styles.share(images, [style] * len(images))
        return {"style": found, "name": self.names.share(images, names)}

    def real(self, style: str) -> tuple[Tensor, list[str]]:
        """Real pictures in a style, of judged names that are in the new style too; the names."""
        if style == STYLE:
            return self.in_style(self.unseen), self.unseen
        chosen = {
            one.name: i
            for i, one in enumerate(self.pictures)
            if one.style == style and one.name in set(self.unseen)
        }
        return judges.images_of(self.pixels[list(chosen.values())]), list(chosen)

    def in_style(self, names: Sequence[str]) -> Tensor:
        """Real pictures [N, 3, 64, 64] of names in the new style."""
        return judges.images_of(np.stack([np.asarray(self.old[name]) for name in names]))

    def train(self, shown: Sequence[str], seed: int) -> Path:
        """A LoRA of the pictures of those names, beside painted ones of others."""
        place = self.place / f"seed-{seed}"
        folder, beside = place / "pictures", place / "painted"
        write_pictures(folder, {name: self.old[name] for name in shown})
        others = sorted({one.name for one in self.pictures} - set(self.judged) - set(shown))
        names = random.Random(seed).sample(others, PAINTED)
        own = self.draw("others", seed, names=names)
        colors = palette(self.in_style(shown), COLORS_KEPT)
        write_pictures(beside, dict(zip(names, to_pil(painted(own, colors)), strict=True)))
        data = [{"folder": folder, "repeats": REPEATS}, {"folder": beside}]
        return df.finetune("emoji", data, place / "lora", seed=seed, resume=True, **TRAINING)

    def draw(
        self,
        file: str,
        seed: int,
        lora: Path | None = None,
        names: Sequence[str] = (),
        style: str = STYLE,
    ) -> Tensor:
        """A picture of each name, by default of those that are judged; made once, then read."""
        place = self.place / f"seed-{seed}" / f"{file}.pt"
        if not place.is_file():
            pipe = df.StableDiffusion.from_pretrained("emoji", dtype=torch.float32)
            if lora is not None:
                pipe.loras.load(lora / "pytorch_lora_weights.safetensors", STYLE, STRENGTH)
            texts = [caption(name, style) for name in names or self.unseen]
            images = torch.cat(
                [
                    pipe(texts[i : i + 75], seed=1000 * seed + i, **DRAWING).images
                    for i in range(0, len(texts), 75)
                ]
            )
            with whole(place) as (temporary,):
                torch.save(images, temporary)
        images = torch.load(place)
        assert isinstance(images, Tensor)
        return images

    def of_seed(self, seed: int) -> dict[str, Any]:
        """What one LoRA does: the twenty names, and shares by row."""
        shown = drawn_names(list(self.old), self.judged, seed)
        lora = self.train(shown, seed)
        base, changed = self.draw("base", seed), self.draw("changed", seed, lora)
        rows = {
            "base": base,
            "tint": tinted(base, self.in_style(self.unseen)),
            "palette": painted(base, palette(self.in_style(shown), COLORS_KEPT)),
            "lora": changed,
        }
        shares = {row: self.judge(images, self.unseen) for row, images in rows.items()}
        return {"shown": shown, "shares": shares}

    @torch.no_grad()
    def ceilings(self) -> dict[str, Shares]:
        """What is read on real pictures, on those of the style after the autoencoder, and on the
        base's in its own styles, as these."""
        found = {f"real, {style}": self.judge(*self.real(style)) for style in (STYLE, *STYLES)}
        vae = df.StableDiffusion.from_pretrained("emoji", dtype=torch.float32).vae
        truth, names = self.real(STYLE)
        again = torch.cat([vae(part).clamp(-1, 1) for part in truth.split(32)])
        own = {
            f"base, {style}": self.judge(
                self.draw(f"base-{style}", SEEDS[0], style=style), self.unseen, style
            )
            for style in STYLES
        }
        return found | {"decoded": self.judge(again, names), **own}

    def run(self, results: Path) -> dict[str, Any]:
        """Train, draw, judge; pictures go to ``results``."""
        results.mkdir(parents=True, exist_ok=True)
        runs = {str(seed): self.of_seed(seed) for seed in SEEDS}
        first = SEEDS[0]
        truth, base, changed = (
            self.in_style(self.unseen), self.draw("base", first), self.draw("changed", first)
        )  # fmt: skip
        columns = list(range(0, len(self.unseen), max(1, len(self.unseen) // 16)))[:16]
        grid = torch.stack([part[columns] for part in (base, changed, truth)])
        drawn.rows(results / "style_lora.png", grid)
        shown = self.in_style(runs[str(first)]["shown"])
        drawn.rows(results / "style_lora_shown.png", shown.unflatten(0, (2, SHOWN // 2)))
        ceilings = self.ceilings()
        return {
            "date": time.strftime("%Y-%m-%d"),
            "command": "python examples/emoji/style_lora.py",
            "machine": hardware.processor(),
            "versions": hardware.versions(),
            "training": TRAINING,
            "drawing": DRAWING | {"strength": STRENGTH},
            "names": self.unseen,
            "ceilings": ceilings,
            "seeds": runs,
            "criteria": verdict(ceilings, {seed: one["shares"] for seed, one in runs.items()}),
        }


def write_pictures(folder: Path, pictures: Mapping[str, Image.Image]) -> None:
    """Write pictures by name, each with its caption in the style beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in pictures.items():
        file = folder / f"{name.replace(' ', '_')}.png"
        image.save(file)
        file.with_suffix(".txt").write_text(caption(name))


def tinted(images: Tensor, like: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] with the mean and the standard deviation that each channel of others
    has over all of them, where they are not white."""

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = foreground(x)
        return flat.mean(0).view(3, 1, 1), flat.std(0).view(3, 1, 1)

    (mean, spread), (new_mean, new_spread) = moments(images), moments(like)
    changed = ((images - mean) / spread * new_spread + new_mean).clamp(-1, 1)
    return torch.where(images.amin(1, keepdim=True) < WHITE, changed, images)


def foreground(images: Tensor) -> Tensor:
    """The colors [P, 3] of all pixels that are not white."""
    flat = images.movedim(1, -1).flatten(0, 2)
    return flat[flat.amin(1) < WHITE]


def palette(images: Tensor, count: int) -> Tensor:
    """White and so many colors [count + 1, 3] of pictures, by k-means (Lloyd 1982)."""
    pixels = foreground(images)
    start = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    colors = pixels[start]
    for _ in range(15):
        nearest = torch.cdist(pixels, colors).argmin(1)
        colors = torch.stack(
            [
                pixels[nearest == i].mean(0) if (nearest == i).any() else colors[i]
                for i in range(count)
            ]
        )
    return torch.cat((colors, torch.ones(1, 3)))


def painted(images: Tensor, colors: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in those colors [K, 3] alone, each pixel in the nearest one."""
    flat = images.movedim(1, -1)
    nearest = torch.cdist(flat.flatten(0, 2), colors).argmin(1)
    return colors[nearest].view(flat.shape).movedim(-1, 1)


def verdict(ceilings: Mapping[str, Shares], seeds: Mapping[str, Mapping[str, Shares]]) -> list[str]:
    """A line for each seed and criterion: what was reached and asked, and whether it passes."""
    lines = []
    own = sum(ceilings[f"base, {style}"]["style"] for style in STYLES) / len(STYLES)
    for seed, rows in seeds.items():
        style, name = rows["lora"]["style"], rows["lora"]["name"]
        for what, value, least in (
            (
                "style, of what the autoencoder lets through",
                style,
                OF_CEILING * ceilings["decoded"]["style"],
            ),
            ("style, of the base's in its own styles", style, OF_OWN * own),
            ("style, of the tint's", style, OF_TINT * rows["tint"]["style"]),
            ("names, of the base's", name, OF_NAMES * rows["base"]["name"]),
        ):
            word = "passes" if value >= least else "fails"
            lines.append(f"seed {seed}: {what}: {value:.1%} of at least {least:.1%} {word}")
    return lines


def page(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["|  | style | name |", "| --- | ---: | ---: |"]
    rows = dict(found["ceilings"])
    for seed, one in found["seeds"].items():
        rows |= {f"{row}, seed {seed}": shares for row, shares in one["shares"].items()}
    lines += [f"| {row} | {one['style']:.1%} | {one['name']:.1%} |" for row, one in rows.items()]
    return PAGE.format(
        command=found["command"],
        date=found["date"],
        processor=found["machine"]["processor"],
        threads=found["machine"]["cores"],
        seeds=", ".join(found["seeds"]),
        first=next(iter(found["seeds"])),
        style=STYLE,
        styles=", ".join((*STYLES, STYLE)),
        count=len(found["names"]),
        kept=COLORS_KEPT,
        painted=PAINTED,
        table="\n".join(lines) + "\n",
        criteria="\n".join(f"- {line}" for line in found["criteria"]),
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
    (options.results / "README.md").write_text(page(made))
    print("\n".join(made["criteria"]))
