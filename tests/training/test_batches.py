"""Batches: every one at once from its number, in any process, whoever reads it."""

from __future__ import annotations

import itertools
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from numerics import error
from tiny import batches, points
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from diffusion_fast.training import Batches
from diffusion_fast.training.distributed import Processes


class Items(Dataset[object]):
    """A list as a data set, read item by item."""

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        return self.items[i]


def numbers(count: int) -> Items:
    return Items([torch.tensor([float(i)]) for i in range(count)])


def first(data: Batches, count: int, start: int = 0) -> list[Tensor]:
    return list(itertools.islice(data.starting_at(start), count))


def test_a_pass_sees_every_item_once_and_passes_differ() -> None:
    data = Batches(numbers(12), 4, seed=1)
    passes = [torch.cat(list(data)).flatten() for _ in range(3)]
    for one in passes:
        assert one.sort().values.tolist() == list(range(12))
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[1], passes[2])
    assert torch.equal(torch.cat(passes), torch.cat(first(data, 9)).flatten())


def test_what_is_left_over_waits_for_another_pass() -> None:
    data = Batches(numbers(11), 4)
    assert len(data) == 2
    assert {len(batch) for batch in first(data, 20)} == {4}
    assert len(torch.cat(first(data, 40)).unique()) == 11


@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_any_batch_can_come_first(start: int) -> None:
    data, again = Batches(numbers(12), 4, seed=1, flip=True), Batches(numbers(12), 4, seed=1)
    whole = first(data, 10)
    assert torch.equal(
        torch.cat([x for (x,) in whole])[4 * start :].flatten(),
        torch.cat(first(again, 10 - start, start)).flatten(),
    )
    assert again.items(start) == whole[start][0].flatten().int().tolist()


def test_the_seed_decides() -> None:
    orders = [torch.cat(first(Batches(numbers(40), 8, seed=s), 5)) for s in (1, 1, 2, -1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])


def test_reading_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    first(Batches(points(), 8, flip=True), 5)
    first(Batches(points(), 8, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("flip", [False, True])
def test_processes_share_a_batch(flip: bool) -> None:
    data = Batches(points(), 8, seed=3, flip=flip)
    for i in (0, 5):
        whole = next(data.starting_at(i))
        parts = [next(data.starting_at(i, Processes(rank, 4))) for rank in range(4)]
        for joint, part in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(joint, torch.cat(part))


def test_workers_read_the_same() -> None:
    here, there = Batches(points(), 8, flip=True), Batches(points(), 8, flip=True, workers=2)
    for a, b in zip(first(here, 4, 2), first(there, 4, 2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Augmented(Dataset[Tensor]):
    """Items that draw from each of the global generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()])


def by_item(data: Batches, start: int, count: int, processes: int = 1) -> dict[float, Tensor]:
    """What some batches, of one pass, drew for each item."""
    rows = []
    for rank in range(processes):
        own = data.starting_at(start, Processes(rank, processes))
        rows += [row for batch in itertools.islice(own, count) for row in batch]
    return {row[0].item(): row[1:] for row in rows}


def test_what_is_drawn_depends_on_seed_pass_and_item_alone() -> None:
    def of(batch_size: int = 4, seed: int = 1, **options: int) -> Batches:
        return Batches(Augmented(), batch_size, seed=seed, **options)

    passes = [by_item(of(), start, 3) for start in (0, 3)]
    assert [len(found) for found in passes] == [12, 12]
    other = [by_item(of(seed=2), 0, 3), by_item(of(), 6, 3)]
    for column in range(3):
        drawn = [row[column].item() for found in passes + other for row in found.values()]
        assert len(set(drawn)) == 4 * 12
    for same in (
        by_item(of(workers=2), 3, 3),
        by_item(of(), 3, 3, processes=2),
        by_item(of(2), 6, 6),
        by_item(of(12), 1, 1),
        by_item(of(), 3, 1) | by_item(of(workers=1), 4, 2),
    ):
        assert same.keys() == passes[1].keys()
        assert all(torch.equal(row, passes[1][item]) for item, row in same.items())


def test_reading_leaves_the_global_generators_alone() -> None:
    def state() -> list[object]:
        return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    undisturbed = state()
    seed()
    first(Batches(Augmented(), 4), 3)
    assert state() == undisturbed


def test_a_data_set_of_tensors_with_a_transform_is_asked_item_by_item() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            (x,) = super().__getitem__(i)
            return (x + torch.rand(()),)

    (x,) = first(Batches(Noisy(torch.zeros(12, 1)), 12), 1)[0]
    assert len(x.unique()) == 12


def test_batches_are_pickled_as_they_are() -> None:
    data = Batches(points(), 8, seed=3, flip=True)
    next(iter(data))
    again = pickle.loads(pickle.dumps(data))
    for a, b in zip(first(data, 4, 2), first(again, 4, 2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(next(iter(data))[0], next(iter(again))[0])  # of the second pass


@pytest.mark.slow  # each worker imports torch anew
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_can_be_started_in_any_way(method: str) -> None:
    code = f"""
import torch, numpy
from torch.utils.data import TensorDataset
from diffusion_fast.training import Batches
if __name__ == "__main__":
    torch.multiprocessing.set_start_method({method!r})
    data = TensorDataset(torch.arange(8.0))
    here, there = Batches(data, 4, seed=1), Batches(data, 4, seed=1, workers=1)
    print(torch.equal(torch.cat([x for x, in here]), torch.cat([x for x, in there])))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_flips_mirror_about_half_of_the_images() -> None:
    image = torch.arange(6.0).view(1, 2, 3)
    data = Batches(TensorDataset(image.expand(400, 1, 2, 3), torch.arange(400)), 400, flip=True)
    (x, labels), (y, _) = first(data, 2)
    flipped = (x == image.flip(-1)).flatten(1).all(1)
    assert ((x == image).flatten(1).all(1) ^ flipped).all()
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / 400**0.5
    assert not torch.equal(x, y)
    assert torch.equal(flipped, data.flips(0))
    assert labels.sort().values.tolist() == list(range(400))


def test_items_are_stacked() -> None:
    x = torch.randn(4, 1, 2, 2)
    items = [(x[i], {"label": i, "text": torch.full((3,), float(i))}) for i in range(4)]
    images, context = first(Batches(Items(items), 4), 1)[0]
    assert context["label"].dtype == torch.int64
    assert error(images, x[context["label"]]) == 0
    assert torch.equal(context["text"][:, 0], context["label"].float())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dataset: expected at least one item, got none"):
        Batches(Items([]), 1)
    with pytest.raises(ValueError, match="batch_size: expected at most the 24 items, got 25"):
        batches(25)
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        batches(0)
    with pytest.raises(TypeError, match="dataset: expected one with a length, got generator"):
        Batches((x for x in "ab"), 1)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3"):
        batches(8).starting_at(0, Processes(1, 3))
    mixed = Items([torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)])
    wanted = r"dataset\[\d\]: expected the shape of dataset\[\d\] \[1, 8, \d\], got \[1, 8, \d\]"
    with pytest.raises(ValueError, match=wanted):
        first(Batches(mixed, 2), 1)
    with pytest.raises(TypeError, match=r"dataset\[\d\]: expected tensors or numbers, got a str"):
        first(Batches(Items(["a", "b"]), 2), 1)
