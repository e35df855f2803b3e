"""What P2, min-SNR, importance sampling and the averaged weights do to the images.

    python -m benchmarks.bench_quality --data /usr/share/datasets/fashion-mnist

Small class-conditional U-Nets are trained on two real data sets, the same way but for one thing,
and sampled with several seeds. A CSV row is one variant with one sampling seed:

- ``share``: images that a classifier, trained on real images alone, reads as the class asked for;
- ``spread``: mean distance between two images of a class, over that of real ones;
- ``frechet``: Frechet distance between classifier features of the images and of all real training
  images. The features are those of our own small classifier, so this number can be compared within
  this table only; it is not the FID. Its floor is the row ``real``: as many held-out real images.

Rows are written as they are finished, and what is there is not done again; a run that is stopped in
the middle of training goes on from its last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import diffusion_fast as df
from diffusion_fast.training import P2, Batches, Checkpoints, ImportanceSampler, MinSNR
from diffusion_fast.training.data import load_digits

from . import fashion_mnist

ROOT = Path(__file__).parents[1]
SETTINGS = ("data", "variant", "ema", "steps", "images", "sampling_seed")
MEASURES = ("frechet", "share", "spread")
COLUMNS = (*SETTINGS, *MEASURES)
SAMPLING_STEPS = 20
BASELINE = "uniform, no weighting"

Variant = Callable[[], dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    BASELINE: dict,
    "P2": lambda: {"loss_weighting": P2()},
    "min-SNR": lambda: {"loss_weighting": MinSNR()},
    "importance sampling": lambda: {"timestep_sampler": ImportanceSampler(1000)},
}


class Judge(Protocol):
    """Says how good images [N, C, H, W] of classes [N] are: values for some of MEASURES."""

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]: ...


@dataclass(frozen=True)
class Task:
    """A data set, a network for it, and how to judge what it draws.

    Attributes:
        images, labels: to train on.
        real: parts of the held-out images with their labels, as the best that can be reached.
        guidance: scale to sample with.
    """

    name: str
    images: Tensor
    labels: Tensor
    real: list[tuple[Tensor, Tensor]]
    config: df.UNetConfig
    judge: Judge
    guidance: float
    steps: int
    per_class: int


def digits(steps: int, per_class: int) -> Task:
    """The digits, the network and the judge of examples/digits.py."""
    sys.path.insert(0, str(ROOT / "examples"))
    from digits import GUIDANCE  # type: ignore[import-not-found]
    from digits import Judge as Reader

    train, held_out = load_digits()
    reader = Reader(train, held_out)

    def judge(images: Tensor, labels: Tensor) -> dict[str, float]:
        return {"share": reader.share(images, labels), "spread": reader.spread(images, labels)}

    real = [(held_out.images, held_out.labels)]
    config = df.UNetConfig.preset("digits")
    return Task(
        *("digits", train.images, train.labels, real, config, judge),
        *(GUIDANCE, steps, per_class),
    )


def fashion(data: Path, work: Path, steps: int, per_class: int) -> Task:
    """Fashion-MNIST at 16 x 16 pixels, with three levels in the U-Net."""
    train, held_out = fashion_mnist.load(data)
    classifier = fashion_mnist.Classifier.trained(train, work / "classifier.safetensors")
    features = fashion_mnist.in_parts(classifier.features, train.images)
    everything = fashion_mnist.Gaussian.of(features)
    real_spread = spread(held_out.images, held_out.labels)

    def judge(images: Tensor, labels: Tensor) -> dict[str, float]:
        images = images.clamp(-1, 1)
        found = fashion_mnist.in_parts(classifier.features, images)
        read = classifier.output(found).argmax(1)
        return {
            "frechet": fashion_mnist.Gaussian.of(found).frechet(everything),
            "share": (read == labels).double().mean().item(),
            "spread": spread(images, labels) / real_spread,
        }

    count = 10 * per_class  # as many as are drawn, so that the distances are as biased
    parts = zip(held_out.images.split(count), held_out.labels.split(count), strict=True)
    config = df.UNetConfig.preset(
        "digits",
        sample_size=fashion_mnist.SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return Task(
        *("Fashion-MNIST", train.images, train.labels, list(parts)[:10], config, judge),
        *(1.0, steps, per_class),
    )


def spread(images: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of a class."""
    means = []
    for label in labels.unique():
        pixels = images[labels == label].flatten(1)
        means.append(torch.cdist(pixels, pixels).sum() / (len(pixels) * (len(pixels) - 1)))
    return torch.stack(means).mean().item()


def train(task: Task, variant: str, work: Path) -> df.Trainer:
    """One run of the table, all of them alike but for the variant."""
    torch.manual_seed(0)
    model = df.UNet2DCondition(task.config)
    name = f"{task.name} {variant} {task.steps}".replace(" ", "_").replace(",", "")
    trainer = df.Trainer(
        model,
        Batches(TensorDataset(task.images, task.labels), 64, seed=0),
        df.DiffusionSchedule(),
        null_context=torch.tensor([model.null_class]),
        checkpoints=Checkpoints(work / name, every=100, keep=1),
        condition_dropout=0.1,
        learning_rate=1e-3,
        warmup_steps=min(100, task.steps // 10),
        gradient_clip=1.0,
        ema_decay=0.995,
        channels_last=True,
        seed=0,
        **VARIANTS[variant](),
    )
    trainer.resume()
    trainer.fit(task.steps)
    return trainer


def draw(task: Task, trainer: df.Trainer, ema: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and the classes asked for."""
    assert trainer.ema is not None
    labels = torch.arange(10).repeat_interleave(task.per_class)
    engine = df.Engine(
        trainer.model,
        trainer.schedule,
        sampler="dpmpp_2m",
        steps=SAMPLING_STEPS,
        guidance_scale=task.guidance,
    )
    generator = torch.Generator().manual_seed(seed)
    with trainer.ema.applied() if ema else contextlib.nullcontext():
        images = [
            engine.sample(
                (len(part), *task.images.shape[1:]),
                context=part,
                null_context=trainer.null_context,
                generator=generator,
            )
            for part in labels.split(200)
        ]
    return torch.cat(images), labels


class Table:
    """The rows of a CSV file, which grows by one at a time, and their means in table.md."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(COLUMNS)

    def has(self, settings: Mapping[str, object]) -> bool:
        texts = {name: str(value) for name, value in settings.items()}
        return any(row.items() >= texts.items() for row in self.rows)

    def add(self, settings: Mapping[str, object], measured: Mapping[str, float]) -> None:
        row = {name: str(value) for name, value in settings.items()}
        row |= {name: f"{measured[name]:.4f}" if name in measured else "" for name in MEASURES}
        self._append([row[name] for name in COLUMNS])
        self.rows.append(row)
        self.summarise()
        print(", ".join(f"{name} {value}" for name, value in row.items() if value), flush=True)

    def summarise(self) -> None:
        self.path.with_name("table.md").write_text(markdown(self.rows), encoding="utf-8")

    def _append(self, values: Sequence[str]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def measure(task: Task, table: Table, work: Path, sampling_seeds: Iterable[int]) -> None:
    """Add the rows of a task that are not there yet."""
    for number, (images, labels) in enumerate(task.real):
        settings = (task.name, "real, held out", "", "", len(images), number)
        row = dict(zip(SETTINGS, settings, strict=True))
        if not table.has(row):
            table.add(row, task.judge(images, labels))
    for variant in VARIANTS:
        rows = [
            dict(zip(SETTINGS, (*head, 10 * task.per_class, seed), strict=True))
            for ema in (("yes", "no") if variant == BASELINE else ("yes",))
            for seed in sampling_seeds
            for head in [(task.name, variant, ema, task.steps)]
        ]
        missing = [row for row in rows if not table.has(row)]
        if missing:
            trainer = train(task, variant, work)
        for row in missing:
            drawn = draw(task, trainer, row["ema"] == "yes", int(str(row["sampling_seed"])))
            table.add(row, task.judge(*drawn))


def markdown(rows: Iterable[Mapping[str, str]]) -> str:
    """Means over the sampling seeds, with the standard deviation between them."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTINGS[:-1]), []).append(row)
    heads = ("data", "variant", "EMA", "steps", "images", "Frechet distance", "read as asked")
    lines = ["| " + " | ".join((*heads, "spread / real")) + " |", "| --- " * 8 + "|"]
    for settings, group in groups.items():
        cells = [*settings[:-1], f"{len(group)} x {settings[-1]}"]
        for name in MEASURES:
            values = [float(row[name]) for row in group if row[name]]
            text = f"{statistics.mean(values):.3f}" if values else ""
            cells.append(text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEBIAN)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality")
    both: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("FASHION", "DIGITS")}
    parser.add_argument("--steps", default=(2400, 800), **both)
    parser.add_argument("--per-class", default=(100, 40), help="images to judge", **both)
    parser.add_argument("--sampling-seeds", type=int, default=3)
    arguments = parser.parse_args()
    table, seeds = Table(arguments.out / "quality.csv"), range(arguments.sampling_seeds)
    (steps, digits_steps), (per_class, digits_per_class) = arguments.steps, arguments.per_class
    measure(fashion(arguments.data, arguments.work, steps, per_class), table, arguments.work, seeds)
    measure(digits(digits_steps, digits_per_class), table, arguments.work, seeds)
    table.summarise()
    print(markdown(table.rows))


if __name__ == "__main__":
    main()
