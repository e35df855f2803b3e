"""A TensorBoard log of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..files import AnyPath
from .trainer import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


class TensorBoardLog:
    """For ``on_read``: loss of every step, validation loss, and the wait for data.

    With ``SampleGrids(..., on_drawn=log.picture)`` the sample grids stand beside them.

    Args:
        folder: that ``tensorboard --logdir`` is given.
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
