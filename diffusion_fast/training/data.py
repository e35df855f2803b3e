"""Data sets that need no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from .batches import Batches


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits: images [N, 1, 8, 8] in [-1, 1] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def batches(self, batch_size: int, seed: int | None = None) -> Batches:
        """Shuffled batches (images, labels); None draws a seed from PyTorch's generator."""
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        return Batches(TensorDataset(self.images, self.labels), batch_size, seed=seed)


def load_digits(held_out: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """The 1,797 real scans that come with scikit-learn (UCI, Optical Recognition of Digits).

    Args:
        held_out: share of every class to keep apart.
        seed: random seed of the split.

    Returns:
        The digits to train on, and those held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message names the command.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
        images, labels, test_size=held_out, stratify=labels, random_state=seed
    )
    x = [torch.tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for p in parts[:2]]
    y = [torch.tensor(p, dtype=torch.int64) for p in parts[2:]]
    return Digits(x[0], y[0]), Digits(x[1], y[1])
