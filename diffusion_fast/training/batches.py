"""Shuffled batches whose order is a function of the seed: any of them can come first."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from ..ops import checks
from .distributed import Processes

_ORDER, _FLIPS = 0, 1  # streams of random numbers that must not meet
Request = tuple[int, list[int]]  # number of the batch, and which items this process reads


class Batches:
    """Batches of a data set, shuffled anew in every pass, without end.

    Batch number n of a seed is always the same, so a run that is resumed goes on with the batch
    that it would have seen, without reading those before; and so several processes can each read
    their part of it. Items left over at the end of a pass are left out of it.

    Args:
        dataset: with ``len()`` and items x_0, (x_0,) or (x_0, context), as tensors or numbers.
        batch_size: items per batch, of all processes together.
        seed: of the order and the flips.
        flip: mirror half of the images left to right, chosen at random.
        workers: processes that read ahead; 0 reads in this one.

    Raises:
        ValueError: a data set that is empty or smaller than a batch, or one with a false attribute
            ``flips`` that is to be mirrored.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        workers: int = 0,
    ) -> None:
        checks.positive_int("batch_size", batch_size)
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset: expected one with a length, got {type(dataset).__name__}")
        if not len(dataset):
            checks.fail("dataset", "at least one item", "none")
        if batch_size > len(dataset):
            checks.fail("batch_size", f"at most the {len(dataset)} items", batch_size)
        if flip and not getattr(dataset, "flips", True):
            wanted = "False, because this data set can't be mirrored (see its flips)"
            checks.fail("flip", wanted, flip)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.flip, self.workers, self._count = flip, workers, len(dataset)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        self._passes = itertools.count()

    def __len__(self) -> int:
        """Batches in a pass."""
        return self._count // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        """One pass, the next one each time."""
        first = next(self._passes) * len(self)
        return itertools.islice(self.starting_at(first), len(self))

    def starting_at(self, number: int, processes: Processes | None = None) -> Iterator[Any]:
        """Batches from ``number`` on, without end; this process's part of each.

        Raises:
            ValueError: processes that can't share a batch evenly.
        """
        processes = processes or Processes()
        self.check_shared(processes)
        fetch, requests = _Fetch(self, processes), _Requests(self, number, processes)
        if not self.workers:
            return (fetch[request] for request in requests)
        return iter(
            DataLoader(
                fetch,
                sampler=requests,
                batch_size=None,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                # Its own: a draw from the global one would change what follows.
                generator=torch.Generator(),
            )
        )

    def check_shared(self, processes: Processes) -> None:
        """Raise a ValueError if the processes can't share a batch evenly."""
        if self.batch_size % processes.count:
            wanted = f"a multiple of the {processes.count} processes"
            checks.fail("batch_size", wanted, self.batch_size)

    def items(self, number: int) -> list[int]:
        """Which items of the data set make up batch ``number``."""
        turn, place = divmod(number, len(self))
        start = place * self.batch_size
        items: list[int] = self._order(turn)[start : start + self.batch_size].tolist()
        return items

    def flips(self, number: int) -> Tensor:
        """Which images of batch ``number`` are mirrored, bool [B]."""
        return torch.rand(self.batch_size, generator=self._generator(_FLIPS, number)) < 0.5

    def settings(self) -> dict[str, Any]:
        """What the order depends on, as JSON can hold it."""
        return {
            "items": self._count,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "flip": self.flip,
        }

    def _shuffled(self, turn: int) -> Tensor:
        return torch.randperm(self._count, generator=self._generator(_ORDER, turn))

    def _generator(self, stream: int, number: int) -> torch.Generator:
        mixed = np.random.SeedSequence([self.seed % 2**64, stream, number]).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))


class _Requests(Sampler[Request]):
    """Which items to read, batch after batch."""

    def __init__(self, batches: Batches, number: int, processes: Processes) -> None:
        self.batches, self.number, self.processes = batches, number, processes

    def __iter__(self) -> Iterator[Request]:
        size = self.batches.batch_size // self.processes.count
        start = self.processes.rank * size
        for number in itertools.count(self.number):
            yield number, self.batches.items(number)[start : start + size]


class _Fetch(Dataset[Any]):
    """A data set of whole batches."""

    def __init__(self, batches: Batches, processes: Processes) -> None:
        self.batches, self.processes = batches, processes

    def __getitem__(self, request: Request) -> Any:
        number, items = request
        dataset = self.batches.dataset
        if isinstance(dataset, TensorDataset):
            batch = dataset[items]  # all at once
        else:
            batch = _collated([dataset[i] for i in items], items)
        if not self.batches.flip:
            return batch
        x_0, *rest = batch if isinstance(batch, tuple) else (batch,)
        flips = self.processes.part(self.batches.flips(number))
        flips = flips.view(-1, *(1,) * (x_0.dim() - 1))
        return torch.where(flips, x_0.flip(-1), x_0), *rest


def _collated(values: list[Any], items: list[int]) -> Any:
    """Items stacked to a batch; those that don't fit together are named."""
    if isinstance(values[0], tuple):
        return tuple(_collated(list(part), items) for part in zip(*values, strict=True))
    if isinstance(values[0], dict):
        return {key: _collated([value[key] for value in values], items) for key in values[0]}
    if isinstance(values[0], (int, float)):
        return torch.tensor(values)
    for item, value in zip(items, values, strict=True):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"dataset[{item}]: expected tensors or numbers, got a {kind}")
        if value.shape != values[0].shape:
            wanted = f"the shape of dataset[{items[0]}] {list(values[0].shape)}"
            checks.fail(f"dataset[{item}]", wanted, list(value.shape))
    return torch.stack(values)
