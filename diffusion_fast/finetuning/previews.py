"""Pictures of fixed prompts, drawn while a model is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..images import grid, save_picture
from ..pipelines import StableDiffusion
from ..training import Progress, Trainer
from ..training.distributed import is_sharded


class Previews:
    """For ``on_read``: every so often FOLDER/step_00001000.png with a picture of each prompt.

    The noise is the same every time. Averaged weights are drawn where there are any.

    Args:
        pipe: the pipeline whose networks are trained.
        trainer: their trainer.
        prompts: what to draw.
        folder: where pictures are written.
        every: steps between two pictures; drawn when the losses are read next.
        before: called before they are drawn, with the weights to draw with in place.
        on_drawn: called with the step and the picture.
        options: keywords of the pipeline's call, such as ``steps`` and ``seed``.
    """

    def __init__(
        self,
        pipe: StableDiffusion,
        trainer: Trainer,
        prompts: Sequence[str],
        folder: Path,
        *,
        every: int,
        before: Callable[[], object] | None = None,
        on_drawn: Callable[[int, Image.Image], object] | None = None,
        **options: Any,
    ) -> None:
        self.pipe, self.trainer, self.prompts, self.folder = pipe, trainer, list(prompts), folder
        self.every, self.before, self.on_drawn, self.options = every, before, on_drawn, options
        self.collective = any(map(is_sharded, trainer.model.parameters()))
        self._drawn = trainer.step // every

    def __call__(self, progress: Progress) -> None:
        if progress.step // self.every <= self._drawn:
            return
        self._drawn = progress.step // self.every
        trainer = self.trainer
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            with contextlib.ExitStack() as stack:
                if trainer.ema:
                    stack.enter_context(trainer.ema.applied())
                if self.collective:
                    stack.enter_context(_gathered(trainer.model))
                if self.before is not None:
                    self.before()
                images = self.pipe(self.prompts, output="tensor", **self.options).images
        finally:
            trainer.model.train(was_training)
        if not trainer.processes.first:
            return
        assert isinstance(images, torch.Tensor)
        picture = grid(images, columns=min(len(self.prompts), 4))
        options = {n: v for n, v in self.options.items() if n != "control_image"}
        settings = {"step": progress.step, "prompts": self.prompts, **options}
        save_picture(picture, self.folder / f"step_{progress.step:08d}.png", settings)
        if self.on_drawn is not None:
            self.on_drawn(progress.step, picture)


@contextlib.contextmanager
def _gathered(model: Any) -> Iterator[None]:
    """While it lasts, a sharded model has whole weights in what is no unit of its own.

    The pipeline calls its networks one by one, and not the model, which else would see to that.
    """
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
