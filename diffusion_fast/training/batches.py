"""Shuffled batches whose order is a function of the seed: any of them can come first."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from ..conditioning import Context
from ..ops import checks
from .distributed import Processes

_ORDER, _FLIPS, _ITEMS, _WORKERS = range(4)  # streams of random numbers that must not meet
Request = tuple[int, list[int]]  # number of the batch, and which items this process reads
Unpacked = tuple[Tensor, Context, Tensor | None]  # x_0, context, weight


class Batches:
    """Batches of a data set, shuffled anew in every pass, without end.

    Batch number n of a seed is always the same, so a run that is resumed goes on with the batch
    that it would have seen, without reading those before; and so several processes can each read
    their part of it. Items left over at the end of a pass are left out of it.

    What a data set draws while an item is read (random crops, noise) depends on the seed, the pass
    and the item alone, as long as it draws from the global generators of PyTorch (on the CPU),
    NumPy and ``random``. These are afterwards as they were before.

    Args:
        dataset: data with ``len()`` and items x_0, (x_0,), (x_0, context) or (x_0, context,
            weight), tensors or numbers; see :class:`~diffusion_fast.training.Trainer`.
        batch_size: items per batch, of all processes together.
        seed: random seed of the order, the flips and what the data set draws.
        flip: mirror half of the images left to right, chosen at random.
        workers: number of processes that read ahead; 0 reads in this one.

    Raises:
        ValueError: a data set that is empty or smaller than a batch, or one with a false attribute
            ``flips`` that is to be mirrored.
    """

    partial = False  # whether a batch may have fewer items than batch_size

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
        if batch_size > len(dataset) and not self.partial:
            checks.fail("batch_size", f"at most the {len(dataset)} items", batch_size)
        if flip and not getattr(dataset, "flips", True):
            wanted = "False, because this data set can't be mirrored (see its flips)"
            checks.fail("flip", wanted, flip)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.flip, self.workers, self._count = flip, workers, len(dataset)
        self._passes = 0  # begun by iterating
        self._drawn: tuple[int, Tensor, Tensor] | None = None  # a pass: number, order, flips

    def __len__(self) -> int:
        """Batches in a pass."""
        return self._count // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        """One pass, the next one each time."""
        self._passes += 1
        first = (self._passes - 1) * len(self)
        return itertools.islice(self.starting_at(first), len(self))

    def starting_at(self, number: int, processes: Processes | None = None) -> Iterator[Any]:
        """Batches from ``number`` on, without end; this process's part of each.

        Raises:
            ValueError: processes that can't share a batch evenly.
        """
        processes = processes or Processes()
        self.check_shared(processes)
        fetch, requests = _Fetch(self), _Requests(self, number, processes)
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
                generator=self._generator(_WORKERS, number, processes.rank),
            )
        )

    def check_shared(self, processes: Processes) -> None:
        """Raise a ValueError if the processes can't share a batch evenly."""
        if self.batch_size % processes.count:
            wanted = f"a multiple of the {processes.count} processes"
            checks.fail("batch_size", wanted, self.batch_size)

    def items(self, number: int) -> list[int]:
        """Which items of the data set make up batch ``number``."""
        order, _ = self._draw(number)
        start = number % len(self) * self.batch_size
        items: list[int] = order[start : start + self.batch_size].tolist()
        return items

    def share(self, number: int, processes: Processes) -> list[int]:
        """Which items of batch ``number`` a process reads."""
        size = self.batch_size // processes.count
        start = processes.rank * size
        return self.items(number)[start : start + size]

    def flips(self, number: int) -> Tensor:
        """Which images of batch ``number`` are mirrored, bool [B]."""
        return self._draw(number)[1][self.items(number)]

    def read(self, number: int, items: list[int]) -> Any:
        """Some of the items of batch ``number``, stacked."""
        if type(self.dataset) is TensorDataset:
            batch = self.dataset[items]  # all at once
        else:
            batch = _collated(self._read_each(number // len(self), items), items)
        if not self.flip:
            return batch
        x_0, *rest = batch if isinstance(batch, tuple) else (batch,)
        flips = self._draw(number)[1][items].view(-1, *(1,) * (x_0.dim() - 1))
        return torch.where(flips, x_0.flip(-1), x_0), *rest

    def _read_each(self, turn: int, items: list[int]) -> list[Any]:
        """Items one by one, each with generators of its own; the global ones are left alone."""
        values, kept = [], (torch.get_rng_state(), np.random.get_state(), random.getstate())
        try:
            for item in items:
                seed = self._seed(_ITEMS, turn, item)
                torch.default_generator.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
                values.append(self.dataset[item])
        finally:
            torch.set_rng_state(kept[0])
            np.random.set_state(kept[1])
            random.setstate(kept[2])
        return values

    def settings(self) -> dict[str, Any]:
        """What the order depends on, as JSON can hold it."""
        return {
            "items": self._count,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "flip": self.flip,
        }

    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Order of the items in the pass of batch ``number``, and by item whether to mirror it."""
        turn, drawn = number // len(self), self._drawn
        if drawn is None or drawn[0] != turn:
            order = torch.randperm(self._count, generator=self._generator(_ORDER, turn))
            flips = (
                torch.rand(
                    self._count, generator=self._generator(_FLIPS, turn), dtype=torch.float32
                )
                < 0.5
            )
            self._drawn = drawn = turn, order, flips
        return drawn[1:]

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*key))

    def _seed(self, *key: int) -> int:
        return int(np.random.SeedSequence([self.seed % 2**64, *key]).generate_state(1)[0])


class _Requests(Sampler[Request]):
    """Which items to read, batch after batch."""

    def __init__(self, batches: Batches, number: int, processes: Processes) -> None:
        self.batches, self.number, self.processes = batches, number, processes

    def __iter__(self) -> Iterator[Request]:
        for number in itertools.count(self.number):
            yield number, self.batches.share(number, self.processes)


class _Fetch(Dataset[Any]):
    """A data set of whole batches."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, request: Request) -> Any:
        return self.batches.read(*request)


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


def forever(dataloader: Iterable[Any]) -> Iterator[Any]:
    """Pass after pass.

    Raises:
        ValueError: a pass without batches.
    """
    while True:
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            checks.fail("dataloader", "at least one batch in every pass", "none")


def unpacked(batch: Any, device: torch.device) -> Unpacked:
    """x_0, the context and the weight (or None) of a batch: x_0, or a tuple of one to three."""
    parts = batch if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3 else (batch,)
    x_0, context, weight = (*parts, None, None)[:3]
    if not isinstance(x_0, Tensor):
        got = type(batch).__name__
        raise TypeError(f"dataloader: expected batches x_0 or (x_0, context), got a {got}")
    return x_0.to(device, non_blocking=True), moved(context, device), moved(weight, device)


def moved(context: Any, device: torch.device) -> Any:
    """A context, or one of its tensors, on a device."""
    if isinstance(context, Mapping):
        return {key: value.to(device, non_blocking=True) for key, value in context.items()}
    return context.to(device, non_blocking=True) if context is not None else None


def split(x_0: Tensor, context: Context, parts: int) -> list[tuple[slice, Tensor, Context]]:
    """A batch in nearly equal parts, none of them empty, with the rows that each holds."""
    rows = [chunk for chunk in torch.arange(len(x_0)).tensor_split(parts) if len(chunk)]
    spans = [slice(int(chunk[0]), int(chunk[-1]) + 1) for chunk in rows]
    if isinstance(context, Mapping):
        return [(s, x_0[s], {key: value[s] for key, value in context.items()}) for s in spans]
    return [(s, x_0[s], None if context is None else context[s]) for s in spans]
