"""Judges a trained model by figures and pictures, into ``benchmarks/results/emoji/``.

    python examples/emoji/evaluate.py [--out build/emoji] [--model build/emoji/model]

Captions, distractors and judges are fixed by seed; judges only see real pictures. Each part is
kept in ``out/evaluation`` when it is done, so that an interrupted run goes on with the next one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import judges
import numpy as np
import pictures as drawn
import torch
from captions import Picture, article, captions_of, composed, judged_names
from make_data import load
from report import write_report
from torch import Tensor
from train_diffusion import copies

import diffusion_fast as df
from diffusion_fast.files import read_json, write_json

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.5, 12.0, 20.0)
STEPS = 25
SAMPLERS = ("ddim", "euler", "dpmpp_2m", "unipc")
FEW, MANY = (5, 10, 20, 50), 1000


@dataclass(frozen=True)
class Asked:
    """What is asked of the model, the same for every model.

    Args:
        training: 200 captions that were trained on, with the name that a judge should read.
        colored: 50 pairs of color and name that were never trained on together.
        names: 100 names to tell apart for the first, ``objects`` for the second.
    """

    training: list[tuple[str, str]]
    colored: list[tuple[str, str]]
    names: list[str]
    objects: list[str]

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> Asked:
        """Drawn by seed from the data set."""
        names = judged_names({picture.name for picture in pictures})
        rng = random.Random(3)
        pairs = [
            (caption, picture.name)
            for picture in pictures
            if picture.name in set(names)
            for caption in dict.fromkeys(captions_of(picture, 6, rng))
        ]
        colored = composed(pictures)
        objects = {name for _, name in colored}
        others = sorted({picture.name for picture in pictures} - objects)
        objects |= set(random.Random(4).sample(others, 100 - len(objects)))
        return cls(random.Random(5).sample(pairs, 200), colored, names, sorted(objects))


class Evaluation:
    """The parts of the evaluation.

    Args:
        out: the working folder, with the data set.
        model: the diffusers folder to judge.
        results: where pictures go.
    """

    def __init__(self, out: Path, model: Path, results: Path) -> None:
        self.out, self.results, self.cache = out, results, out / "evaluation"
        self.cache.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
        self.pictures, self.pixels = load(out)
        self.real = judges.images_of(self.pixels)
        self.asked = Asked.of(self.pictures)
        self.pipe = df.StableDiffusion.from_pretrained(model, dtype=torch.float32)
        everything = copies(self.pictures, self.pixels)[0]
        self.trained_on = torch.stack([small(one) for one in everything])  # [N, 3 * 16 * 16]

    def judge(self, kind: str) -> judges.Judge:
        names = self.asked.names if kind == "shape and color" else self.asked.objects
        return judges.judge_of(kind, self.pictures, self.pixels, names, self.out)

    def draw(self, captions: Sequence[str], guidance: float, **more: Any) -> Tensor:
        """Pictures [N, 3, 64, 64], the seed of each its number."""
        options = {"steps": STEPS, "output": "tensor"} | more
        parts = [
            self.pipe(
                list(captions[i : i + 50]), guidance_scale=guidance, seed=1000 + i, **options
            ).images
            for i in range(0, len(captions), 50)
        ]
        return torch.cat(parts)

    def captions(self) -> dict[str, Any]:
        """Everything that is asked."""
        return vars(self.asked)

    def real_pictures(self) -> dict[str, Any]:
        """How well the judges do on real pictures."""
        found: dict[str, Any] = judges.accuracy(
            self.pictures, self.pixels, self.asked.names, self.asked.objects, self.out
        )
        share, count = judges.color_accuracy(self.pictures, self.pixels)
        return found | {f"color, on {count} pictures whose name has one": share}

    @torch.no_grad()
    def ceiling(self) -> dict[str, Any]:
        """What the autoencoder alone loses, in dB; and the share that is read all the same."""
        vae = self.pipe.vae
        again = torch.cat([vae(part).clamp(-1, 1) for part in self.real.split(32)])
        errors = (again - self.real).square().flatten(1).mean(1) / 4
        decibel = -10 * errors.log10()
        order = decibel.argsort().tolist()
        shown = [*order[:6], *order[len(order) // 2 :][:6], *order[-6:]]
        drawn.rows(self.results / "autoencoder.png", torch.stack((self.real[shown], again[shown])))
        mine = [i for i, one in enumerate(self.pictures) if one.name in set(self.asked.names)]
        names = [self.pictures[i].name for i in mine]
        judge = self.judge("shape and color")
        return {
            "mean dB": decibel.mean().item(),
            "dB of the mean error": -10 * errors.mean().log10().item(),
            "worst dB": decibel.min().item(),
            "real pictures read as their name": judge.share(self.real[mine], names),
            "the same after the autoencoder": judge.share(again[mine], names),
        }

    def at_guidance(self, guidance: float) -> dict[str, Any]:
        """Shares that are read as asked, spread and distances at one guidance scale."""
        training, colored = self.asked.training, self.asked.colored
        images = self.draw([caption for caption, _ in training], guidance)
        names = [name for _, name in training]
        words = [article(f"{color} {name}") for color, name in colored]
        composed_images = self.draw(words, guidance)
        objects = self.judge("shape alone").read(composed_images)
        right = [read == name for read, (_, name) in zip(objects, colored, strict=True)]
        hues = [
            judges.color_of(image) == color
            for image, (color, _) in zip(composed_images, colored, strict=True)
        ]
        again = [caption for caption, _ in training[:12] for _ in range(8)]
        spread = self.draw(again, guidance)
        label = f"{guidance:g}"
        shown = torch.cat((images[:24], composed_images[:24]))
        texts = [*(caption for caption, _ in training[:24]), *words[:24]]
        drawn.labelled(self.results / f"guidance_{label.replace('.', '_')}.png", shown, texts, 8)
        return {
            "training captions": self.judge("shape and color").share(images, names),
            "composed: object": sum(right) / len(right),
            "composed: color": sum(hues) / len(hues),
            "composed: both": sum(a and b for a, b in zip(right, hues, strict=True)) / len(right),
            "spread": distance_within(spread, 8),
            "nearest training picture": self.nearest(images),
            "nearest, composed": self.nearest(composed_images),
        }

    def nearest(self, images: Tensor) -> float:
        """Median distance to the nearest picture that was trained on, recolored ones included."""
        mine = torch.stack([small(judges.pixels_of(image)) for image in images])
        return torch.cdist(mine, self.trained_on).min(1).values.median().item()

    def real_distances(self) -> dict[str, float]:
        """The scale of the distances: between the styles of a name, and between real pictures."""
        chosen = random.Random(6).sample(range(len(self.pictures)), 200)
        flat = torch.stack([small(image) for image in self.pixels])
        away = torch.cdist(flat[chosen], flat)
        away[torch.arange(200), chosen] = torch.inf
        return {
            "spread of the three styles of a name": distance_within(self.real, 3),
            "a real picture to the nearest other one": away.min(1).values.median().item(),
        }

    def few_steps(self, guidance: float) -> dict[str, Any]:
        """ODE samplers at few steps against their own 1000-step solution, from the same noise."""
        pairs = self.asked.training[:32]
        captions, names = [caption for caption, _ in pairs], [name for _, name in pairs]
        judge, found = self.judge("shape and color"), {}

        def run(sampler: str, steps: int) -> tuple[Tensor, float]:
            result = self.pipe(
                captions, guidance_scale=guidance, seed=1, sampler=sampler, steps=steps,
                output="latent",
            )  # fmt: skip
            latents = result.images
            with torch.no_grad():
                images = self.pipe.vae.decode(self.pipe.vae.unscale(latents)).clamp(-1, 1)
            return latents, judge.share(images, names)

        for sampler in SAMPLERS:
            exact, share = run(sampler, MANY)
            found[sampler] = {str(MANY): {"distance": 0.0, "read as asked": share}}
            for steps in FEW:
                latents, share = run(sampler, steps)
                away = ((latents - exact).square().mean() / exact.square().mean()).sqrt().item()
                found[sampler][str(steps)] = {"distance": away, "read as asked": share}
        share = run("ddpm", MANY)[1]
        found["ddpm"] = {str(MANY): {"distance": None, "read as asked": share}}
        return found

    def editing(self, guidance: float) -> dict[str, Any]:
        """Examples of inpainting and of image-to-image."""
        options = {"guidance_scale": guidance, "steps": STEPS}
        drawn.inpainting(self.pipe, self.results / "inpainting.png", **options)
        drawn.image_to_image(self.pipe, self.results / "image_to_image.png", **options)
        return {}

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part's figures, made once."""
        file = self.cache / f"{name}.json"
        if not file.is_file():
            print(f"evaluating: {name}", flush=True)
            write_json(make(), file)
        return read_json(file)

    def run(self) -> dict[str, Any]:
        """All parts; few steps and editing at the guidance that does best."""
        found = {
            "captions": self.part("captions", self.captions),
            "judges": self.part("judges", self.real_pictures),
            "autoencoder": self.part("autoencoder", self.ceiling),
            "distances": self.part("distances", self.real_distances),
        }
        found["steps"] = STEPS
        found["guidance"] = {
            f"{g:g}": self.part(f"guidance-{g:g}", lambda g=g: self.at_guidance(g))
            for g in GUIDANCE
        }
        best = max(GUIDANCE, key=lambda g: found["guidance"][f"{g:g}"]["training captions"])
        found["best guidance"] = best
        found["few steps"] = self.part("few-steps", lambda: self.few_steps(best))
        self.part("editing", lambda: self.editing(best))
        return found


def small(image: np.ndarray) -> Tensor:
    """A picture [64, 64, 3] as 16 x 16 colors in [0, 1], flat: what distances are taken of."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    return torch.nn.functional.avg_pool2d(x, 4).flatten() / (3 * 16 * 16) ** 0.5


def distance_within(images: Tensor, group: int) -> float:
    """Mean distance (root mean square of colors in [0, 1]) of two pictures of a group."""
    flat = torch.stack([small(judges.pixels_of(image)) for image in images])
    means = [torch.cdist(part, part).sum() / (group * (group - 1)) for part in flat.split(group)]
    return torch.stack(means).mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/emoji"), help="folder to work in")
    parser.add_argument("--model", type=Path, help="diffusers folder; default: OUT/model")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/emoji"))
    options = parser.parse_args()
    model = options.model or options.out / "model"
    write_report(Evaluation(options.out, model, options.results).run(), options.results)
