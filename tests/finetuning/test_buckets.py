"""Shapes, and batches of pictures of one shape."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from diffusion_fast.finetuning.bucket_batches import BucketBatches
from diffusion_fast.finetuning.buckets import best_fit, fit, shapes
from diffusion_fast.training.distributed import Processes


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(512, 64), (768, 64), (1024, 64), (1024, 32), (64, 16), (500, 8)]),
    st.floats(-1.0, 1.0),
    st.integers(30, 5000),
)
def test_at_most_one_step_is_cut_off(grid: tuple[int, int], tilt: float, side: int) -> None:
    """Of any image whose ratio is between those of the shapes."""
    resolution, step = grid
    known = shapes(resolution, step)
    assert all(h % step == w % step == 0 and h * w <= resolution**2 for h, w in known)
    most = max(h / w for h, w in known)
    ratio = most**tilt
    height, width = max(1, round(side * ratio**0.5)), max(1, round(side / ratio**0.5))
    if not 1 / most <= height / width <= most:
        return  # rounded out of the range
    found = best_fit((height, width), known)
    assert found.cut <= step
    assert found.scaled[0] >= found.shape[0]
    assert found.scaled[1] >= found.shape[1]
    assert 0 in (found.scaled[0] - found.shape[0], found.scaled[1] - found.shape[1])


def test_a_shape_is_covered() -> None:
    assert fit((100, 300), (64, 64)).scaled == (64, 192)
    assert fit((100, 300), (64, 64)).corner() == (0, 64)
    assert fit((300, 100), (64, 64)).scaled == (192, 64)


class Numbers(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor([float(index)]), {"draw": torch.rand(1)}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=25),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2**40),
)
def test_every_picture_once_a_pass(groups: list[int], size: int, count: int, seed: int) -> None:
    """Whoever reads it, wherever one begins; the mean is that of the pictures, each once."""
    data = Numbers(len(groups))
    batch_size = size * count
    batches = BucketBatches(data, batch_size, groups, seed=seed)
    again = BucketBatches(data, batch_size, groups, seed=seed)
    steps = 2 * len(batches)
    streams = [batches.starting_at(0)]
    streams += [
        BucketBatches(data, batch_size, groups, seed=seed).starting_at(0, Processes(rank, count))
        for rank in range(count)
    ]
    seen: list[int] = []
    for number in range(steps):
        items = again.items(number)
        assert len({groups[item] for item in items}) == 1
        assert len(items) <= batch_size
        x_0, context = next(streams[0])
        assert x_0.flatten().tolist() == items
        assert torch.equal(next(again.starting_at(number))[1]["draw"], context["draw"])
        total = 0.0
        for stream in streams[1:]:
            part, _, *weight = next(stream)
            factors = weight[0] if weight else torch.ones(len(part))
            total += (factors * part.flatten()).mean().item() / count
        assert abs(total - sum(items) / len(items)) < 1e-4
        seen += items
    assert Counter(seen) == dict.fromkeys(range(len(groups)), 2)
    assert seen[: len(groups)] != seen[len(groups) :] or len(groups) < 8
