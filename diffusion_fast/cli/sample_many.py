"""``diffusion-fast sample --out-dir``: many images, one file each, by all processes of torchrun."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from PIL.Image import Image
from torch import Tensor

from ..engine import Engine
from ..files import read_lines
from ..images import grid
from ..ops import checks
from ..pipelines.sharded import Draw, Job, jobs_for, make_missing, place

# Settings of a run that don't decide what one image is: a restart may change them.
_NOT_OF_ONE = ("device", "classes", "per_class")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are left out.

    Raises:
        ValueError: a file that can't be read, or holds no prompt.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts: expected a text file, got {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        checks.fail("--prompts", "a file with a prompt in each line", f"{path}, which has none")
    return prompts


def many_prompts(
    draw: Callable[[str, int], Image],
    prompts: Sequence[str],
    out_dir: Path,
    *,
    seed: int,
    settings: Mapping[str, Any],
) -> None:
    """One image of each prompt: OUT_DIR/00000.png ... in the order of the prompts.

    Args:
        draw: the image of a prompt and a seed, such as a text-to-image pipeline's.
        prompts: the prompts of all processes.
        out_dir: folder of the files.
        seed: random seed of the first image; each next one has the next seed.
        settings: what else the images depend on; it stands in the files.
    """

    def unit(jobs: Sequence[Job]) -> list[Image]:
        return [draw(job.subject["prompt"], job.seed) for job in jobs]

    _make([{"prompt": prompt} for prompt in prompts], unit, out_dir, seed, settings, 1)


def many_classes(
    engine: Engine,
    labels: Sequence[int],
    shape: tuple[int, int, int],
    out_dir: Path,
    *,
    null_context: Tensor,
    seed: int,
    settings: Mapping[str, Any],
    scale: int = 1,
    batch_size: int = 1,
) -> None:
    """One image of each label, as :func:`many_prompts`.

    Args:
        engine: the engine of a class-conditional model.
        labels: the classes of all images of all processes.
        shape: shape of an image, [C, H, W].
        out_dir: folder of the files.
        null_context: the class that means "none", [1].
        seed: random seed of the first image; each next one has the next seed.
        settings: what else the images depend on; it stands in the files.
        scale: pixels per pixel in the files.
        batch_size: images to draw at once. Those of one batch stay together whatever the number of
            processes, since the size of a batch can change how its numbers are rounded.
    """

    def unit(jobs: Sequence[Job]) -> list[Image]:
        images = engine.sample(
            (len(jobs), *shape),
            context=torch.tensor([job.subject["class"] for job in jobs]).to(null_context),
            null_context=null_context,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        )
        return [grid(image[None], 1, scale, gap=0) for image in images]

    _make([{"class": label} for label in labels], unit, out_dir, seed, settings, batch_size)


def _make(
    subjects: Sequence[Mapping[str, Any]],
    draw: Draw,
    out_dir: Path,
    seed: int,
    settings: Mapping[str, Any],
    batch_size: int,
) -> None:

    settings = {name: value for name, value in settings.items() if name not in _NOT_OF_ONE}
    rank, count = place()
    made = make_missing(
        jobs_for(subjects, seed),
        out_dir,
        draw,
        settings,
        batch_size=batch_size,
        rank=rank,
        count=count,
    )
    who = f"process {rank} of {count}: " if count > 1 else ""
    typer.echo(f"{who}wrote {made.new} images to {out_dir}, {made.kept} were there")
