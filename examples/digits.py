"""From noise to digits: train on real scans, sample every class three ways, judge, draw.

Run it with ``make demo`` or ``python examples/digits.py --out out``. It takes a few minutes on two
CPU cores: half of them to train, the other half mostly for DDPM, which takes all 1,000 steps. On a
slow machine both take fewer steps, to be done in about five minutes with what was reached by then.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import digits_pictures as pictures
import torch
from rich.console import Console
from rich.table import Table
from sklearn.svm import SVC
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.training import Progress
from diffusion_fast.training.data import Digits, load_digits
from diffusion_fast.training.watch import show_progress

GUIDANCE = 1.5
SAMPLERS = (("ddpm", None), ("ddim", 50), ("dpmpp_2m", 20))
GUIDANCE_SCALES = (0.0, 1.0, 1.5, 3.0, 5.0, 7.5, 10.0, 20.0)
SHAPE = (1, 8, 8)
LEAST_SHARE, LEAST_SPREAD = 0.95, 0.75  # what the demo must reach with its defaults
# Shares of the time: what training is planned for, its end, and the end of sampling; the pictures
# need the rest.
TRAINING, LATEST, SAMPLING = 0.4, 0.5, 0.75


class Judge:
    """A classifier that has only seen real digits, and how varied real digits of a class are."""

    def __init__(self, train: Digits, held_out: Digits) -> None:
        self.classifier = SVC(gamma=0.05, C=10.0).fit(self._pixels(train.images), train.labels)
        self.real_share = self.share(held_out.images, held_out.labels)
        self.real_spread = self._distance(held_out.images, held_out.labels)

    @staticmethod
    def _pixels(images: Tensor) -> Tensor:
        return images.clamp(-1, 1).flatten(1)

    def share(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that are read as their label."""
        return float((self.classifier.predict(self._pixels(images)) == labels.numpy()).mean())

    def spread(self, images: Tensor, labels: Tensor) -> float:
        """Mean distance between two images of a class, over that of real ones."""
        return self._distance(images, labels) / self.real_spread

    def _distance(self, images: Tensor, labels: Tensor) -> float:
        means = []
        for label in range(10):
            pixels = self._pixels(images[labels == label])
            pairs = len(pixels) * (len(pixels) - 1)
            means.append(torch.cdist(pixels, pixels).sum() / pairs)
        return torch.stack(means).mean().item()


@dataclass
class Result:
    """One sampler's digits."""

    sampler: str
    steps: int
    seconds: float
    images: Tensor


class Clock:
    """The time that is left of a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.perf_counter(), 60 * minutes

    def until(self, share: float) -> float:
        """Seconds until a share of the time is over."""
        return self.start + share * self.seconds - time.perf_counter()


class TimeUp(Exception):
    """Training took longer than its steps were planned to."""


def learner(digits: Digits, steps: int, batch_size: int, timesteps: int) -> df.Trainer:
    """A model with fresh weights, and what trains it for a number of steps."""
    torch.manual_seed(0)
    config = df.UNetConfig.preset("digits")
    model = df.UNet2DCondition(config).to(memory_format=torch.channels_last)
    return df.Trainer(
        model,
        digits.batches(batch_size, seed=0),
        df.DiffusionSchedule(timesteps),
        null_context=torch.tensor([model.null_class]),
        condition_dropout=0.1,
        learning_rate=2e-3,
        warmup_steps=min(50, steps // 10),
        decay="cosine",
        gradient_clip=1.0,
        ema_decay=0.99,
        seed=0,
    )


def train(
    digits: Digits, steps: int, batch_size: int, timesteps: int, clock: Clock
) -> tuple[df.Trainer, list[float]]:
    """Train for a number of steps, or as many as there is time for."""
    trial = learner(digits, steps, batch_size, timesteps)
    trial.fit(1)  # the first step is slow: it finds out how many threads are the fastest
    start = time.perf_counter()
    trial.fit(2)
    planned = int(clock.until(TRAINING) / (time.perf_counter() - start) * 2)
    steps = max(1, min(steps, planned))
    trainer = learner(digits, steps, batch_size, timesteps)

    def stop(progress: Progress) -> None:
        if clock.until(LATEST) < 0:
            raise TimeUp

    with show_progress(steps, batch_size) as on_read, contextlib.suppress(TimeUp):
        trainer.fit(steps, [on_read, stop])
    return trainer, trainer.losses


def sample_all(trainer: df.Trainer, labels: Tensor, clock: Clock) -> list[Result]:
    """Every sampler, the one with the most steps last: it gets what time is left."""
    results = {}
    for sampler, steps in sorted(SAMPLERS, key=lambda pair: pair[1] or math.inf):
        if steps is None and results:
            longest = max(results.values(), key=lambda result: result.steps)
            possible = max(1, int(clock.until(SAMPLING) * longest.steps / longest.seconds))
            steps = possible if possible < trainer.schedule.timesteps else None
        print(f"sampling by {sampler}", file=sys.stderr)
        results[sampler] = sample(trainer, labels, sampler, steps)
    return [results[sampler] for sampler, _ in SAMPLERS]


def sample(trainer: df.Trainer, labels: Tensor, sampler: str, steps: int | None) -> Result:
    engine = df.Engine(
        trainer.model,
        trainer.schedule,
        sampler=sampler,
        steps=steps,
        guidance_scale=GUIDANCE,
        progress=True,
    )
    start = time.perf_counter()
    images = engine.sample(
        (len(labels), *SHAPE),
        context=labels,
        null_context=trainer.null_context,
        generator=torch.Generator().manual_seed(0),
    )
    seconds = time.perf_counter() - start
    return Result(sampler, len(engine.table), seconds, images)


def draw(
    out: Path, trainer: df.Trainer, digits: Digits, results: list[Result], labels: Tensor
) -> list[Path]:
    """The pictures that show what noising, sampling and guidance do."""
    null, schedule = trainer.null_context, trainer.schedule
    one_each = torch.arange(10)

    def run(**options: object) -> Tensor:
        return df.sample(
            trainer.model,
            schedule,
            (10, *SHAPE),
            sampler="dpmpp_2m",
            steps=20,
            context=one_each,
            null_context=null,
            generator=torch.Generator().manual_seed(1),
            **options,
        )

    frames: list[tuple[float, Tensor]] = []
    run(guidance_scale=GUIDANCE, callback=lambda step, t, x: frames.append((t, x)))
    by_scale = [(scale, run(guidance_scale=scale)) for scale in GUIDANCE_SCALES]
    named = [(f"{r.sampler}, {r.steps} steps", r.images, labels) for r in results]
    return [
        pictures.noising(out / "noising.png", schedule, digits.images[:1]),
        pictures.digits(out / "digits.png", named),
        pictures.denoising(out / "denoising.png", frames),
        pictures.guidance(out / "guidance.png", by_scale),
    ]


def falls_short(result: Result, labels: Tensor, judge: Judge) -> bool:
    """Whether the digits are not what was asked for, or all alike."""
    share = judge.share(result.images, labels)
    return share < LEAST_SHARE or judge.spread(result.images, labels) < LEAST_SPREAD


def report(results: list[Result], labels: Tensor, judge: Judge) -> Table:
    table = Table(title="Digits", title_justify="left")
    for name in ("sampler", "steps", "seconds", "images/s", "read as asked", "spread / real"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    for r in results:
        table.add_row(
            r.sampler,
            str(r.steps),
            f"{r.seconds:.1f}",
            f"{len(labels) / r.seconds:.1f}",
            f"{judge.share(r.images, labels):.1%}",
            f"{judge.spread(r.images, labels):.2f}",
        )
    table.add_row("real, held out", "", "", "", f"{judge.real_share:.1%}", "1.00", style="dim")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--train-steps", type=int, default=1000, help="batches to train on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=1000, help="length of the noise schedule")
    parser.add_argument("--minutes", type=float, default=5.0, help="longest time, nearly")
    parser.add_argument("--per-class", type=int, default=10, help="digits of each class to judge")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, clock = Console(), Clock(arguments.minutes)

    digits, held_out = load_digits()
    console.print(f"training on {len(digits.images)} scans, {len(held_out.images)} are held out")
    trainer, losses = train(
        digits, arguments.train_steps, arguments.batch_size, arguments.timesteps, clock
    )
    pictures.loss(arguments.out / "loss.png", losses)

    labels = torch.arange(10).repeat_interleave(arguments.per_class)
    assert trainer.ema is not None
    with trainer.ema.applied():
        results = sample_all(trainer, labels, clock)
        written = draw(arguments.out, trainer, digits, results, labels)
    console.print("wrote", ", ".join(str(p) for p in [*written, arguments.out / "loss.png"]))
    judge = Judge(digits, held_out)
    console.print(report(results, labels, judge))
    asked = (arguments.train_steps, arguments.timesteps)
    done = (len(losses), next(r.steps for r in results if r.sampler == "ddpm"))
    short = [r.sampler for r in results if falls_short(r, labels, judge)]
    if done != asked:
        console.print(
            f"To be done in {arguments.minutes:g} minutes on this machine, {done[0]} of {asked[0]}"
            f" steps were trained and ddpm took {done[1]} of {asked[1]}; more: --minutes"
        )
    elif short:
        needed = f"at least {LEAST_SHARE:.0%} read as asked and a spread of {LEAST_SPREAD}"
        sys.exit(f"below what is expected ({needed}): {', '.join(short)}")


if __name__ == "__main__":
    main()
