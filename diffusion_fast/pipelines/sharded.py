"""Many images, shared out among processes: each one a file, each file made once.

Which process makes which images follows from their places in the list alone, so processes need not
talk to each other, one that dies stops none of the others, and a restart makes what is missing.
Every image has a seed of its own. Images are made in units of ``batch_size``, which stay together
whatever the number of processes: then an image is bit for bit the same on the same kind of machine
(and, on CPUs, with the same number of threads).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import AnyPath
from ..ops import checks

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Job:
    """One image to make.

    Attributes:
        name: name of its file, without the suffix.
        seed: random seed of its noise.
        subject: what it shows, as it stands in its file: ``{"prompt": "a cat"}``.
    """

    name: str
    seed: int
    subject: Mapping[str, Any]


Draw = Callable[[Sequence[Job]], Iterable["Image"]]


@dataclass(frozen=True)
class Made:
    """What one process did: images it made, and those of its share that were there before."""

    new: int
    kept: int


def jobs_for(subjects: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Job]:
    """Files 00000.png, 00001.png ... with seeds counted up from ``seed``."""
    return [Job(f"{i:05d}", seed + i, subject) for i, subject in enumerate(subjects)]


def place() -> tuple[int, int]:
    """Which process this is and how many there are, as torchrun says; 0 of 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share(jobs: Sequence[Job], rank: int, count: int, batch_size: int = 1) -> list[Sequence[Job]]:
    """The units that one of ``count`` processes makes; all together make each job once."""
    checks.positive_int("batch_size", batch_size)
    if not 0 <= rank < count:
        checks.fail("rank", f"one of {count} processes, from 0", rank)
    units = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    return units[rank::count]


def make_missing(
    jobs: Sequence[Job],
    folder: AnyPath,
    draw: Draw,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 1,
    rank: int = 0,
    count: int = 1,
) -> Made:
    """Make this process's share of the images, those that are not there yet.

    Args:
        jobs: the jobs of all processes, the same in each of them.
        folder: where ``NAME.png`` are put, each written whole or not at all.
        draw: makes the images of one unit. They may depend on its jobs only.
        settings: what all images share; stands in each file, with the job's subject and seed.
        batch_size: jobs in a unit.
        rank: which process this is, see :func:`place`.
        count: number of processes.

    Raises:
        ValueError: an image that is there was made with other settings; nothing is overwritten.
        OSError: a file can't be written.
    """
    from ..images import save_picture  # imports Pillow

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    units = share(jobs, rank, count, batch_size)
    wanted = {job.name: _settings(job, settings) for unit in units for job in unit}
    there = _present(folder, wanted)

    def write(made: Sequence[tuple[Job, Image]]) -> None:
        for job, image in made:
            save_picture(image, folder / f"{job.name}.png", wanted[job.name])

    new = 0
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:  # packs the files of a unit while the next one is drawn
        for unit in units:
            missing = {job.name for job in unit} - there
            if missing:  # the unit is made whole: its images may depend on one another's rounding
                drawn = zip(unit, draw(unit), strict=True)
                made = [(job, image) for job, image in drawn if job.name in missing]
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, made)
                new += len(made)
        if writing is not None:
            writing.result()
    return Made(new, len(there))


def _settings(job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(settings) | dict(job.subject) | {"seed": job.seed}
    found: dict[str, Any] = json.loads(json.dumps(values))  # as it is read back
    return found


def _present(folder: Path, wanted: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the images that need not be made; removes what a killed process left of its own."""
    found = set()
    for path in folder.iterdir():
        if path.suffix == ".tmp" and path.name[1:].split(".png.")[0] in wanted:
            path.unlink()
        if path.suffix == ".png" and path.stem in wanted:
            _compare(path, wanted[path.stem])
            found.add(path.stem)
    return found


def _compare(path: Path, wanted: Mapping[str, Any]) -> None:
    from ..images import read_settings

    found = read_settings(path)
    lines = [
        f"\n  {name}: {found.get(name)!r} there, {wanted.get(name)!r} asked for"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if lines:
        message = f"{path}: expected an image with the settings asked for, or none, got another:"
        raise ValueError(message + "".join(lines))
