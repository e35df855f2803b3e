"""Batches of pictures of one shape; every picture once a pass, also where a batch isn't full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..training.batches import Batches
from ..training.distributed import Processes

_SHAPES, _SHUFFLED = 11, 12  # streams of random numbers, apart from those of Batches


class BucketBatches(Batches):
    """Batches each of which holds items of one group, in an order that is a function of the seed.

    What is left of a group at the end of a pass is a smaller batch. Processes share it as well:
    each reads equally many of its items, some of them again where they can't be shared evenly, and
    weights make the mean over all processes that of the items themselves.

    Args:
        dataset: data with items (x_0, context) or (x_0, context, weight).
        batch_size: items per full batch, of all processes together.
        groups: number of the group of each item.
        seed: random seed of the order, and of what the data set draws.
        workers: number of processes that read ahead.
        prepare: makes of a batch what the trainer gets.
    """

    partial = True

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        groups: Sequence[int],
        *,
        seed: int = 0,
        workers: int = 0,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, seed=seed, workers=workers)
        self.prepare, self._processes = prepare, Processes()
        members: dict[int, list[int]] = {}
        for item, group in enumerate(groups):
            members.setdefault(group, []).append(item)
        self._members = [members[group] for group in sorted(members)]
        self._batches = sum(-(-len(items) // batch_size) for items in self._members)
        self._plan: tuple[int, list[list[int]]] | None = None  # a pass: its number, its batches

    def __len__(self) -> int:
        return self._batches

    def starting_at(self, number: int, processes: Processes | None = None) -> Iterator[Any]:
        self._processes = processes or Processes()
        found = super().starting_at(number, processes)
        return found if self.prepare is None else map(self.prepare, found)

    def items(self, number: int) -> list[int]:
        turn = number // len(self)
        if self._plan is None or self._plan[0] != turn:
            batches = []
            for group, members in enumerate(self._members):
                generator = self._generator(_SHAPES, turn, group)
                order = torch.randperm(len(members), generator=generator).tolist()
                for start in range(0, len(order), self.batch_size):
                    batches.append([members[i] for i in order[start : start + self.batch_size]])
            mixed = torch.randperm(len(batches), generator=self._generator(_SHUFFLED, turn))
            self._plan = turn, [batches[i] for i in mixed.tolist()]
        return self._plan[1][number % len(self)]

    def share(self, number: int, processes: Processes) -> list[int]:
        """Which items of batch ``number`` a process reads; ~item for one that doesn't count."""
        items = self.items(number)
        size = -(-len(items) // processes.count)
        padded = items + [~items[0]] * (size * processes.count - len(items))
        return padded[processes.rank * size : (processes.rank + 1) * size]

    def read(self, number: int, items: list[int]) -> Any:
        batch = super().read(number, [item if item >= 0 else ~item for item in items])
        count = len(self.items(number))
        joint = len(items) * self._processes.count
        if joint == count:
            return batch
        x_0, context, *weight = batch
        factor = torch.tensor(
            [joint / count if item >= 0 else 0.0 for item in items], dtype=torch.float32
        )
        if weight:
            factor = weight[0] * factor.view(-1, *(1,) * (weight[0].dim() - 1))
        return x_0, context, factor

    def settings(self) -> dict[str, Any]:
        sizes = [len(items) for items in self._members]
        return super().settings() | {"groups": sizes}
