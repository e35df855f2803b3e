"""Drawing with a class-conditional model, the kind that ``train`` writes."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .common import SCHEDULER, check_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..engine import Engine
    from ..schedule import DiffusionSchedule


MOST_AT_ONCE = 16  # images that one process draws together, of many


@dataclass(frozen=True)
class _Ready:
    """A loaded model."""

    engine: Engine
    columns: list[int]
    shape: tuple[int, int, int]
    null_context: Tensor


@dataclass(frozen=True)
class ClassDrawing:
    """Settings of a picture with a column for each class."""

    KIND: ClassVar[str] = "classes"

    model: str
    classes: str | None = None
    per_class: int = 4
    sampler: str = "dpmpp_2m"
    steps: str | None = None
    guidance: str = "1.5"
    eta: float = 0.0
    spacing: str = "leading"
    seed: int = 0
    scale: int = 8
    device: str = "cpu"

    def draw(self) -> tuple[Image, dict[str, Any], str]:
        """The picture, its settings, and what was done in words."""
        import torch

        from ..images import grid

        ready = self._ready()
        labels = ready.columns * self.per_class
        images = ready.engine.sample(
            (len(labels), *ready.shape),
            context=torch.tensor(labels, device=self.device),
            null_context=ready.null_context,
            generator=torch.Generator().manual_seed(self.seed),
        )
        picture = grid(images, len(ready.columns), self.scale)
        return picture, dataclasses.asdict(self), f"{len(labels)} images"

    def draw_many(self, folder: Path) -> None:
        """One file for each image, by all processes of torchrun."""
        from .sample_many import many_classes

        ready = self._ready()
        many_classes(
            ready.engine,
            ready.columns * self.per_class,
            ready.shape,
            folder,
            null_context=ready.null_context,
            seed=self.seed,
            settings=dataclasses.asdict(self),
            scale=self.scale,
            batch_size=min(len(ready.columns), MOST_AT_ONCE),
        )

    def _ready(self) -> _Ready:
        import torch

        from ..engine import Engine
        from ..files import read_json
        from ..models import UNet2DCondition
        from ..ops import checks

        check_device(self.device)
        folder = Path(self.model)
        unet = UNet2DCondition.from_pretrained(folder).to(self.device)
        if unet.config.num_classes is None:
            checks.fail("--model", "a class-conditional model", f"one without classes ({folder})")
        config = read_json(folder / SCHEDULER)
        columns = class_list(self.classes, unet.config.num_classes)
        engine = Engine(
            unet,
            _schedule(folder, config),
            device=self.device,
            progress=sys.stderr.isatty(),
            sampler=self.sampler,
            steps=self._steps(),
            eta=self.eta,
            timestep_spacing=self.spacing,
            prediction_type=config.get("prediction_type", "epsilon"),
            guidance_scale=max(one_number("--guidance", self.guidance), 1.0),
        )
        side = unet.config.sample_size or 8
        height, width = side if isinstance(side, tuple) else (side, side)
        null = torch.tensor([unet.null_class], device=self.device)
        return _Ready(engine, columns, (unet.config.out_channels, height, width), null)

    def _steps(self) -> int | None:
        if self.steps is None:
            return None if self.sampler == "ddpm" else 20
        return int(one_number("--steps", self.steps, whole=True))


def one_number(option: str, text: str, whole: bool = False) -> float:
    """A number; lists are for prompts."""
    from ..ops import checks

    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        checks.fail(option, f"{kind} (lists are for models with prompts)", repr(text))


def class_list(text: str | None, count: int) -> list[int]:
    """``0-9`` or ``3,1,4`` as a list; None is all classes."""
    from ..ops import checks

    if text is None:
        return list(range(count))
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            checks.fail("--classes", "numbers and ranges such as 0-9 or 3,1,4", repr(text))
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            checks.fail("--classes", "ranges that go up, such as 0-9", repr(part))
        found += numbers
    if not found or max(found) >= count:
        checks.fail("--classes", f"classes in [0, {count})", repr(text))
    return found


def _schedule(model: Path, config: dict[str, Any]) -> DiffusionSchedule:
    from ..schedule import DiffusionSchedule

    try:
        return DiffusionSchedule.from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{model / SCHEDULER}: {error}") from error
