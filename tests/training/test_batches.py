"""Batches: every one at once from its number, in any process, whoever reads it."""

from __future__ import annotations

import itertools

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
