"""Functions for ``on_read``: what a run leaves to look at, as CSV, TensorBoard and pictures."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..conditioning import Context
from ..engine import Engine
from ..files import AnyPath, read_text, whole
from ..ops import checks
from .distributed import is_sharded
from .trainer import Trainer
from .watch import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

_COLUMNS = ("step", "loss", "validation_loss")


class CsvLog:
    """One row per step: step, loss, and the validation loss where it was measured.

    A run that is resumed goes on in the same file, without the rows of steps that were lost.

    Args:
        path: CSV file to write.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = Path(path)
        self._written: int | None = None  # the last step in the file; None: not looked at yet

    def __call__(self, progress: Progress) -> None:
        if self._written is None:
            self._begin(progress)
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(self._rows(progress, self._written, {}))
        self._written = progress.step

    def _begin(self, progress: Progress) -> None:
        """Write everything so far anew, with the validation losses of the file that is there."""
        validated: dict[int, str] = {}
        try:
            rows = list(csv.reader(io.StringIO(read_text(self.path), newline="")))
            if rows and tuple(rows[0]) != _COLUMNS:
                checks.fail(str(self.path), f"the columns {', '.join(_COLUMNS)}", rows[0])
            validated = {int(row[0]): str(float(row[2])) for row in rows[1:] if any(row[2:3])}
        except FileNotFoundError:
            pass
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{self.path}: expected a log of training: {error}") from error
        with (
            whole(self.path) as (temporary,),
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(self._rows(progress, 0, validated))

    @staticmethod
    def _rows(progress: Progress, after: int, known: dict[int, str]) -> list[Sequence[object]]:
        rows: list[Sequence[object]] = []
        for step in range(after + 1, progress.step + 1):
            last = step == progress.step and progress.validation_loss is not None
            validated = progress.validation_loss if last else known.get(step, "")
            rows.append((step, progress.losses[step - 1], validated))
        return rows


class SampleGrids:
    """Draws images of the averaged weights every so often: FOLDER/step_00001000.png.

    The noise is the same every time, so that the pictures show what training changes. All
    processes have to call this, since they may share the model; the first one writes.

    Args:
        trainer: whose model to sample.
        folder: folder to write pictures to.
        shape: size of what is drawn, [B, C, H, W].
        every: steps between two pictures; drawn when the losses are read next.
        context: what to draw, [B, ...].
        columns: images in a row.
        seed: random seed of the noise that is drawn from.
        on_drawn: called with the step and the picture, such as
            :meth:`TensorBoardLog.picture <diffusion_fast.training.TensorBoardLog.picture>`.
        options: keywords of :class:`~diffusion_fast.Engine`, such as ``sampler``, ``steps``,
            ``guidance_scale``.
    """

    collective = True

    def __init__(
        self,
        trainer: Trainer,
        folder: AnyPath,
        shape: Sequence[int],
        *,
        every: int,
        context: Context = None,
        columns: int = 8,
        seed: int = 0,
        on_drawn: Callable[[int, Image], object] | None = None,
        **options: Any,
    ) -> None:
        checks.positive_int("every", every)
        self.trainer, self.folder, self.shape = trainer, Path(folder), tuple(shape)
        self.every, self.context, self.columns, self.seed = every, context, columns, seed
        self.on_drawn = on_drawn
        self.options: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20} | options
        self._drawn = 0  # multiples of ``every``

    def __call__(self, progress: Progress) -> None:
        if progress.step // self.every <= self._drawn:
            return
        self._drawn = progress.step // self.every
        trainer = self.trainer
        options = dict(self.options)
        if any(map(is_sharded, trainer.model.parameters())):
            options["rewrites"] = "none"  # weights come together in the model's own forward pass
        engine = Engine(
            trainer.model,
            trainer.schedule,
            device=trainer.device,
            prediction_type=trainer.options.prediction_type,
            **options,
        )
        with trainer.ema.applied() if trainer.ema else contextlib.nullcontext():
            images = engine.sample(
                self.shape,
                context=self.context,
                null_context=trainer.null_context,
                generator=torch.Generator().manual_seed(self.seed),
            )
        if not trainer.processes.first:
            return
        from ..images import grid, save_picture  # imports Pillow, which is needed here only

        path = self.folder / f"step_{progress.step:08d}.png"
        picture = grid(images, self.columns)
        save_picture(picture, path, {"step": progress.step, "seed": self.seed})
        if self.on_drawn is not None:
            self.on_drawn(progress.step, picture)


class TensorBoardLog:
    """For ``on_read``: loss of every step, validation loss, and the wait for data.

    With ``SampleGrids(..., on_drawn=log.picture)`` the sample grids stand beside them.

    Args:
        folder: log folder, which ``tensorboard --logdir`` is given.
        after: what :meth:`Trainer.resume` returned: later steps that an interrupted run has left in
            the folder are replaced.

    Raises:
        ModuleNotFoundError: tensorboard is not installed; the message names the command.
    """

    def __init__(self, folder: AnyPath, after: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "TensorBoard logs are written by its own package: pip install tensorboard"
            ) from error
        self.folder, self._written = folder, after
        self._make = SummaryWriter
        self._made: Any = None

    @property
    def writer(self) -> Any:
        """The SummaryWriter, made when there is something to write."""
        if self._made is None:
            self._made = self._make(str(self.folder), purge_step=self._written + 1)
        return self._made

    def __call__(self, progress: Progress) -> None:
        writer = self.writer
        for step in range(self._written + 1, progress.step + 1):
            writer.add_scalar("loss", progress.losses[step - 1], step)
        if progress.validation_loss is not None:
            writer.add_scalar("validation loss", progress.validation_loss, progress.step)
        writer.add_scalar("share of time waiting for data", progress.waiting, progress.step)
        writer.flush()
        self._written = progress.step

    def picture(self, step: int, image: Image) -> None:
        """Show a grid of samples."""
        import numpy as np

        pixels = np.asarray(image)
        self.writer.add_image("samples", pixels, step, dataformats="HWC"[: pixels.ndim])
        self.writer.flush()
