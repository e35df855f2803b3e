"""Timesteps: the distributions, that weights keep the objective, and the history of losses."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error
from torch import Tensor

from diffusion_fast.training import ImportanceSampler, LogitNormalSampler, UniformSampler

CPU = torch.device("cpu")
T = 20


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned(timesteps: int = T) -> ImportanceSampler:
    """A sampler that has seen losses falling from 2 to near 0 over t, ten times each."""
    sampler = ImportanceSampler(timesteps)
    for _ in range(10):
        t = torch.arange(timesteps)
        sampler.update(t, 2 * (1 - t / timesteps) + 0.1 * torch.rand(timesteps))
    return sampler


SAMPLERS = [UniformSampler(T), LogitNormalSampler(T, unbiased=True), learned()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_the_weighted_loss_is_that_of_uniform_sampling(sampler: UniformSampler) -> None:
    count = 200_000
    loss = torch.linspace(3, 0.5, T, dtype=torch.float64)
    t, weight = sampler.sample(count, CPU, seeded())
    seen = loss[t] * (1.0 if weight is None else weight)
    deviation = (seen.std() / math.sqrt(count)).item()
    assert abs(seen.mean() - loss.mean()) < 4 * deviation
    assert deviation < 0.01


@pytest.mark.parametrize("sampler", SAMPLERS[1:], ids=lambda s: type(s).__name__)
def test_the_weights_are_exact(sampler: LogitNormalSampler | ImportanceSampler) -> None:
    t, weight = sampler.sample(5000, CPU, seeded())
    assert weight is not None
    assert len(t.unique()) == T
    p = sampler.probabilities
    assert error(p.sum(), torch.tensor(1.0)) < 1e-12
    assert error(weight, 1 / (T * p[t])) < 1e-6
    loss = torch.rand(T, dtype=torch.float64)
    per_t = torch.empty(T, dtype=torch.float64).index_put_((t,), weight.double())
    assert error((p * per_t * loss).sum(), loss.mean()) < 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_draws_follow_the_probabilities(sampler: UniformSampler) -> None:
    """Pearson's chi-squared, 19 degrees of freedom: above 43.8 once in a thousand."""
    count = 50_000
    t, _ = sampler.sample(count, CPU, seeded(3))
    p = getattr(sampler, "probabilities", torch.full((T,), 1 / T))
    expected = p * count
    seen = torch.bincount(t, minlength=T)
    assert ((seen - expected).square() / expected).sum() < 43.8


def test_logit_normal_is_its_density() -> None:
    sampler = LogitNormalSampler(1000, mean=-0.5, std=0.8)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    z = (torch.logit(u) + 0.5) / 0.8
    density = torch.exp(-z.square() / 2) / (0.8 * math.sqrt(2 * math.pi) * u * (1 - u))
    assert error(sampler.probabilities * 1000, density) < 1e-4
    t, weight = sampler.sample(4000, CPU, seeded())
    assert weight is None
    assert t.median() == pytest.approx(1000 / (1 + math.exp(0.5)), abs=15)


def test_importance_is_uniform_until_all_have_been_seen() -> None:
    sampler = ImportanceSampler(4, history=3)
    for i in range(3):
        assert sampler.probabilities.tolist() == [0.25] * 4
        sampler.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]))
        if i == 0:
            sampler.update(torch.tensor([3]), torch.tensor([4.0]))
    assert sampler.probabilities.tolist() == [0.25] * 4
    sampler.update(torch.tensor([3, 3]), torch.tensor([4.0, 4.0]))
    expected = 0.999 * torch.tensor([1, 2, 3, 4]) / 10 + 0.001 / 4
    assert error(sampler.probabilities, expected) < 1e-6
    _, weight = ImportanceSampler(4).sample(5, CPU)
    assert weight is not None
    assert weight.tolist() == [1.0] * 5


def test_a_loss_of_zero_everywhere_stays_uniform() -> None:
    sampler = ImportanceSampler(2, history=1)
    sampler.update(torch.tensor([0, 1]), torch.zeros(2))
    assert sampler.probabilities.tolist() == [0.5, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40))
def test_the_history_keeps_the_last_losses(seed: int, history: int, batch: int) -> None:
    """Against lists, with many of one timestep in a batch."""
    rng, sampler = random.Random(seed), ImportanceSampler(3, history=history)
    lists: list[list[float]] = [[], [], []]
    for _ in range(4):
        t = [rng.randrange(3) for _ in range(batch)]
        losses = [rng.random() for _ in t]
        sampler.update(torch.tensor(t), torch.tensor(losses, dtype=torch.float64))
        for i, loss in zip(t, losses, strict=True):
            lists[i] = [*lists[i], loss][-history:]
    state = sampler.state_dict()
    for i, kept in enumerate(lists):
        assert sorted(state["losses"][i].tolist())[history - len(kept) :] == sorted(kept)


def test_the_state_carries_on() -> None:
    ours, theirs = learned(), ImportanceSampler(T)
    theirs.load_state_dict({k: v.clone() for k, v in ours.state_dict().items()})
    for sampler in (ours, theirs):
        sampler.update(torch.tensor([1, 1, 2]), torch.tensor([5.0, 6.0, 7.0]))
    assert torch.equal(ours.probabilities, theirs.probabilities)
    assert torch.equal(ours.sample(9, CPU, seeded())[0], theirs.sample(9, CPU, seeded())[0])
    with pytest.raises(ValueError, match=r"state\['losses'\]: expected shape of this sampler"):
        ImportanceSampler(T + 1).load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="state: expected the keys"):
        UniformSampler(T).load_state_dict(ours.state_dict())


def test_bad_input() -> None:
    def update(t: list[int], losses: Tensor) -> None:
        ImportanceSampler(3).update(torch.tensor(t), losses)

    with pytest.raises(ValueError, match=r"t: expected values in \[0, 3\)"):
        update([3], torch.ones(1))
    with pytest.raises(ValueError, match=r"losses: expected shape \[B\] = \[2\]"):
        update([1, 2], torch.ones(1))
    with pytest.raises(ValueError, match="history: expected a positive integer"):
        ImportanceSampler(3, history=0)
    with pytest.raises(ValueError, match="uniform: expected a share"):
        ImportanceSampler(3, uniform=0)
    with pytest.raises(ValueError, match="timesteps: expected a positive integer"):
        UniformSampler(0)
    with pytest.raises(ValueError, match="std: expected a positive number"):
        LogitNormalSampler(3, std=0)
    with pytest.raises(ValueError, match="std: expected one that gives every timestep a chance"):
        LogitNormalSampler(1000, std=0.05, unbiased=True)
