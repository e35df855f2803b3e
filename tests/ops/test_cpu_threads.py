"""How many threads share a step: what is measured, kept and used; times are made up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compilers import needs_cpu_kernels

import diffusion_fast as df
from diffusion_fast.kernels import measurements
from diffusion_fast.ops.cpu import contest, library, threads

pytestmark = needs_cpu_kernels
CALLS = [("linear", (torch.empty(8, 64, device="meta"), torch.empty(32, 64, device="meta")))]


@pytest.fixture(autouse=True)
def _four(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Four threads, where nothing was ever measured."""
    monkeypatch.setattr(library, "_final", True)
    monkeypatch.setattr(contest, "lookup", measurements.lookup)
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
    forget()


def forget() -> None:
    """As in a new process."""
    measurements.chosen.clear()
    measurements.loaded.clear()


class Step:
    """A step that moves a clock of its own, by a number of seconds for each number of threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self) -> None:
        self.calls += 1
        self.now += self.seconds[torch.get_num_threads()]


MakeStep = Callable[[dict[int, float]], Step]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> MakeStep:
    return lambda seconds: Step(monkeypatch, seconds)


def test_fewer_threads_inside_only_and_for_this_thread_alone() -> None:
    def seen_elsewhere() -> int:
        found: list[int] = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        return found[0]

    with threads.using(2):
        assert (torch.get_num_threads(), threads.most()) == (2, 4)
        assert seen_elsewhere() == 4
        with threads.using(1):
            assert (torch.get_num_threads(), threads.most()) == (1, 4)
        assert (torch.get_num_threads(), threads.most()) == (2, 4)
    with pytest.raises(KeyError), threads.using(1):
        raise KeyError
    assert (torch.get_num_threads(), threads.most()) == (4, 4)


def test_a_number_that_is_set_inside_stays() -> None:
    with threads.using(2):
        torch.set_num_threads(3)
    assert (torch.get_num_threads(), threads.most()) == (3, 3)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({4: 0.004, 2: 0.003, 1: 0.002}, 1),
        ({4: 0.004, 2: 0.003, 1: 0.0029}, 2),  # too little is gained
        ({4: 0.004, 2: 0.0039, 1: 0.001}, 4),
        ({4: 0.06, 2: 0.03, 1: 0.02}, 4),  # long enough for all of them
    ],
)
def test_the_fastest_number_is_taken(
    seconds: dict[int, float], expected: int, step: MakeStep
) -> None:
    assert contest.threads_for(CALLS, step(seconds)) == expected


def test_it_is_measured_once(step: MakeStep) -> None:
    measured = step({4: 0.004, 2: 0.001, 1: 0.002})
    assert contest.threads_for(CALLS, measured) == 2
    calls = measured.calls
    forget()  # in another process it is on disk
    assert contest.threads_for(CALLS, measured) == 2
    assert measured.calls == calls
    assert contest.threads_for(CALLS * 2, measured) == 2
    assert measured.calls > calls


@pytest.mark.parametrize("kept", ["", "two", "0", "5"])
def test_a_number_that_is_none_is_measured_again(kept: str, step: MakeStep) -> None:
    assert contest.threads_for(CALLS, step({4: 0.004, 2: 0.001, 1: 0.002})) == 2
    (file,) = {file for file, _ in measurements.chosen}
    ((key, _),) = measurements.results(file).items()
    measurements.remember(file, key, kept)
    assert contest.threads_for(CALLS, step({4: 0.004, 2: 0.003, 1: 0.002})) == 1


def test_where_the_work_is_much_or_unknown_nothing_is_measured(step: MakeStep) -> None:
    large = torch.empty(2**14, 2**10, device="meta"), torch.empty(2**10, 2**10, device="meta")
    for calls in ([], [("attention", large)], [("linear", large)]):
        measured = step({})
        assert contest.threads_for(calls, measured) == 4
        assert measured.calls == 0


def test_an_engine_takes_that_many_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = df.UNet2DCondition(df.UNetConfig.preset("digits")), set()
    label = torch.tensor([3])

    def sampled() -> torch.Tensor:
        engine = df.Engine(model, df.DiffusionSchedule(), sampler="ddim", steps=3)
        before = engine.explain()["threads"]
        x = engine.sample((1, 1, 8, 8), label, x_T=torch.ones(1, 1, 8, 8))
        assert before == "not decided"
        seen.add(engine.explain()["threads"])
        return x

    monkeypatch.setattr(contest, "threads_for", lambda calls, step: 4)
    expected = sampled()
    monkeypatch.setattr(contest, "threads_for", lambda calls, step: 1)
    assert torch.allclose(sampled(), expected, atol=1e-5)
    assert seen == {"4 of 4", "1 of 4, measured to be faster"}
    assert torch.get_num_threads() == 4
