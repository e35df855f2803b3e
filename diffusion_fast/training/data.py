"""Data sets that need no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits: images [N, 1, 8, 8] in [-1, 1] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def batches(self, batch_size: int, seed: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches (images, labels), another order in every pass."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        data = TensorDataset(self.images, self.labels)
        order = RandomSampler(data, generator=generator)
        # Whole batches are indexed at once: no collation image by image.
        sampler = BatchSampler(order, batch_size, drop_last=True)
        return DataLoader(data, sampler=sampler, batch_size=None)


def load_digits(held_out: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """The 1,797 real scans that come with scikit-learn (UCI, Optical Recognition of Digits).

    Args:
        held_out: share of every class to keep apart.
        seed: of the split.

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
