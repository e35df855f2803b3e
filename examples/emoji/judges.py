"""Judges that have only seen real pictures: which of 100 names a picture shows, and its color.

A name is judged by a small convolutional network trained on shifted, scaled, mirrored and (for
recolored objects) hue-turned copies of real pictures. The color is the dominant hue of the pixels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from captions import HUES, STYLES, Picture, dominant_color, rotated
from precision import fast_autocast
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_fast.files import whole
from diffusion_fast.images import to_uint8

STEPS, BATCH = 1500, 64


class Classifier(nn.Sequential):
    """Pictures [B, 3, 64, 64] in [-1, 1] to one score for each name."""

    def __init__(self, names: int) -> None:
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, names))


class Judge:
    """Tells the names of a fixed list apart.

    Args:
        names: the list.
        network: a trained :class:`Classifier` of as many names.
    """

    def __init__(self, names: Sequence[str], network: Classifier) -> None:
        self.names, self.network = list(names), network.eval()

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The most likely name of each picture [N, 3, 64, 64] in [-1, 1]."""
        scores = torch.cat([self.network(part) for part in images.split(BATCH)])
        return [self.names[i] for i in scores.argmax(1).tolist()]

    def share(self, images: Tensor, names: Sequence[str]) -> float:
        """Share of the pictures that are read as their name."""
        read = self.read(images)
        return sum(a == b for a, b in zip(read, names, strict=True)) / len(read)


def train_judge(
    pictures: Sequence[Picture],
    pixels: np.ndarray,
    names: Sequence[str],
    file: Path,
    *,
    hues: bool,
    left_out: set[int],
) -> Judge:
    """A judge of ``names``, trained on their real pictures; read from ``file`` if it is there.

    Args:
        pictures, pixels: the data set.
        names: what to tell apart.
        file: for the weights.
        hues: train on copies with any hue, so that the judge goes by shape.
        left_out: numbers of pictures that it must not see.
    """
    torch.manual_seed(0)
    network = Classifier(len(names))
    if file.is_file():
        network.load_state_dict(torch.load(file))
        return Judge(names, network)
    label = {name: i for i, name in enumerate(names)}
    seen = [i for i, p in enumerate(pictures) if p.name in label and i not in left_out]
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    rng = random.Random(0)
    for _ in range(STEPS):
        chosen = rng.choices(seen, k=BATCH)
        images = [rotated(pixels[i], rng.uniform(0, 360)) if hues else pixels[i] for i in chosen]
        x = moved(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1)
        targets = torch.tensor([label[pictures[i].name] for i in chosen])
        with fast_autocast("cpu"):
            scores = network(x)
        optimizer.zero_grad()
        F.cross_entropy(scores.float(), targets, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    with whole(file) as (temporary,):
        torch.save(network.state_dict(), temporary)
    return Judge(names, network)


def moved(x: Tensor) -> Tensor:
    """Pictures shifted, scaled, turned a little, mirrored, blurred and noisy, at random."""
    count = len(x)
    angle, scale = 0.25 * torch.randn(count), 1 + 0.15 * torch.randn(count)
    mirror = torch.randint(0, 2, (count,)) * 2.0 - 1
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack((mirror * cosine, -sine, mirror * sine, cosine), 1).view(count, 2, 2)
    grid = torch.cat((rows, 0.12 * torch.randn(count, 2, 1)), 2)
    # Outside is white: -1 of a picture from which white was taken away is 0.
    places = F.affine_grid(grid, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, places, align_corners=False) + 1
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blur = torch.rand(count, 1, 1, 1)
    x = torch.lerp(x, soft, blur)
    return x + 0.05 * torch.randn(count, 1, 1, 1) * torch.randn_like(x)


def accuracy(
    pictures: Sequence[Picture],
    pixels: np.ndarray,
    names: Sequence[str],
    objects: Sequence[str],
    out: Path,
) -> dict[str, float]:
    """How often judges are right about real pictures that they have not seen.

    One picture of every third name is held out from the judges. For a style that a judge has never
    seen, three more are trained on two styles each.
    """
    found = {}
    for kind, list_of in (("shape and color", names), ("shape alone", objects)):
        unseen = held_out_pictures(pictures, list_of)
        judge = judge_of(kind, pictures, pixels, list_of, out)
        found[f"{kind}: pictures held out"] = _share(judge, pictures, pixels, unseen)
    for style in STYLES:
        unseen = {i for i, p in enumerate(pictures) if p.style == style and p.name in set(names)}
        file = out / f"judge-without-{style}.pt"
        judge = train_judge(pictures, pixels, names, file, hues=False, left_out=unseen)
        found[f"shape and color: {style} style, never seen"] = _share(
            judge, pictures, pixels, unseen
        )
    return found


def _share(
    judge: Judge, pictures: Sequence[Picture], pixels: np.ndarray, numbers: set[int]
) -> float:
    chosen = sorted(numbers)
    return judge.share(images_of(pixels[chosen]), [pictures[i].name for i in chosen])


def held_out_pictures(pictures: Sequence[Picture], names: Sequence[str]) -> set[int]:
    """One picture of every third name, the styles in turn."""
    chosen = {name: STYLES[i // 3 % 3] for i, name in enumerate(names) if i % 3 == 0}
    return {i for i, p in enumerate(pictures) if chosen.get(p.name) == p.style}


def judge_of(
    kind: str, pictures: Sequence[Picture], pixels: np.ndarray, names: Sequence[str], out: Path
) -> Judge:
    """The judge by ``"shape and color"`` or by ``"shape alone"``."""
    file = out / f"judge-{kind.replace(' ', '-')}.pt"
    left_out = held_out_pictures(pictures, names)
    hues = kind == "shape alone"
    return train_judge(pictures, pixels, names, file, hues=hues, left_out=left_out)


def images_of(pixels: np.ndarray) -> Tensor:
    """[N, 64, 64, 3] as [N, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def color_of(image: Tensor) -> str | None:
    """The color word of a picture [3, 64, 64] in [-1, 1]."""
    return dominant_color(pixels_of(image))[0]


def pixels_of(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] as [H, W, 3] of 0 to 255."""
    return to_uint8(image).permute(1, 2, 0).numpy()


def color_accuracy(pictures: Sequence[Picture], pixels: np.ndarray) -> tuple[float, int]:
    """How often the color judge says the color that is part of a real picture's name."""
    pairs = [(word, i) for i, p in enumerate(pictures) for word in p.name.split() if word in HUES]
    right = sum(dominant_color(pixels[i])[0] == word for word, i in pairs)
    return right / len(pairs), len(pairs)
