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
from diffusion_fast import cores
from diffusion_fast.engine.loop import Loop
from diffusion_fast.kernels import measurements
from diffusion_fast.ops.cpu import contest, library, step_contest, threads

pytestmark = needs_cpu_kernels
CALLS = [("linear", (torch.empty(8, 64, device="meta"), torch.empty(32, 64, device="meta")))]
KNOWN = contest.known  # as it is outside of tests
WORK = contest.Work("a network", lambda: CALLS)


@pytest.fixture(autouse=True)
def _four(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Four threads, where nothing was ever measured."""
    monkeypatch.setattr(library, "_final", True)
    monkeypatch.setattr(contest, "known", KNOWN)
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
    forget()


def forget() -> None:
    """As in a new process."""
    measurements.known.clear()


class Step:
    """A step that moves a clock of its own, by a number of seconds for each number of threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.calls, self.waits = seconds, 0.0, 0, 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(cores, "waited", lambda: self.waits * self.now)

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
    assert step_contest.threads_for(WORK, step(seconds)) == expected


def test_it_is_measured_once(step: MakeStep) -> None:
    measured = step({4: 0.004, 2: 0.001, 1: 0.002})
    assert step_contest.threads_for(WORK, measured) == 2
    calls = measured.calls
    forget()  # in another process it is on disk
    assert step_contest.threads_for(WORK, measured) == 2
    assert measured.calls == calls
    assert step_contest.threads_for(contest.Work("another", lambda: CALLS), measured) == 2
    assert measured.calls > calls


def test_beside_other_programs_it_is_measured_by_each_process(step: MakeStep) -> None:
    measured = step({4: 0.004, 2: 0.001, 1: 0.002})
    measured.waits = 0.5
    assert step_contest.threads_for(WORK, measured) == 2
    calls = measured.calls
    assert step_contest.threads_for(WORK, measured) == 2
    assert measured.calls == calls
    forget()
    measured.seconds[1] = 0.0001
    assert step_contest.threads_for(WORK, measured) == 2
    assert measured.calls > calls
    forget()
    measured.waits = 0.0
    assert step_contest.threads_for(WORK, measured) == 1
    forget()
    measured.seconds[1] = 0.002
    assert step_contest.threads_for(WORK, measured) == 1


def test_beside_other_programs_long_steps_are_measured_too(step: MakeStep) -> None:
    """All threads may take so long only because one of them isn't running."""
    measured = step({4: 0.08, 2: 0.06, 1: 0.03})
    measured.waits = 0.5
    assert step_contest.threads_for(WORK, measured) == 1


@pytest.mark.parametrize("kept", ["", "two", "0", "5"])
def test_a_number_that_is_none_is_measured_again(kept: str, step: MakeStep) -> None:
    assert step_contest.threads_for(WORK, step({4: 0.004, 2: 0.001, 1: 0.002})) == 2
    (file,) = (library.cache_folder() / "tuning").iterdir()
    ((key, _),) = measurements.results(file).items()
    measurements.remember(file, key, kept)
    assert step_contest.threads_for(WORK, step({4: 0.004, 2: 0.003, 1: 0.002})) == 1


def test_where_the_work_is_much_or_unknown_nothing_is_measured(step: MakeStep) -> None:
    large = torch.empty(2**14, 2**10, device="meta"), torch.empty(2**10, 2**10, device="meta")
    for calls in ([], [("attention", large)], [("linear", large)]):
        for name in ("", f"of {calls}"):
            measured = step({})
            assert step_contest.threads_for(contest.Work(name, lambda c=calls: c), measured) == 4
            assert measured.calls == 0


def test_an_engine_takes_that_many_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, label = df.UNet2DCondition(df.UNetConfig.preset("digits")), torch.tensor([3])
    in_steps: list[int] = []
    in_callbacks: list[int] = []
    predicted = Loop.predicted

    def step(self: Loop) -> torch.Tensor:
        in_steps.append(torch.get_num_threads())
        return predicted(self)

    def callback(*_: object) -> None:
        in_callbacks.append(torch.get_num_threads())

    monkeypatch.setattr(Loop, "predicted", step)
    results = []
    for count, told in ((4, "4 of 4"), (1, "1 of 4, measured to be faster")):
        monkeypatch.setattr(step_contest, "threads_for", lambda work, step, count=count: count)
        engine = df.Engine(model, df.DiffusionSchedule(), sampler="ddim", steps=3)
        assert engine.explain()["threads"] == "not decided"
        x_T = torch.ones(1, 1, 32, 32)
        results.append(engine.sample((1, 1, 32, 32), label, x_T=x_T, callback=callback))
        assert engine.explain()["threads"] == told
    assert in_steps == [4] * 3 + [1] * 3
    assert in_callbacks == [4] * 6
    assert torch.allclose(*results, atol=1e-5)
    assert torch.get_num_threads() == 4


def test_mkl_takes_fewer_threads_too() -> None:
    """Its number is its own once PyTorch's was set."""
    x = torch.randn(2048, 2048)

    def cores() -> float:
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(3):
            x @ x
        return (time.process_time() - used) / (time.perf_counter() - wall)

    with threads.using(1):
        assert cores() < 1.2


def test_a_backend_that_is_asked_for_is_not_measured(step: MakeStep) -> None:
    measured = step({})
    with df.use_backend("reference"):
        assert step_contest.threads_for(WORK, measured) == 4
    with df.use_backend(linear="reference"):
        assert step_contest.threads_for(WORK, measured) == 4
    assert measured.calls == 0


def test_what_has_hooks_is_not_called_to_be_timed() -> None:
    model, calls = df.UNet2DCondition(df.UNetConfig.preset("digits")), []
    model.conv_out.register_forward_hook(lambda *_: calls.append(torch.get_num_threads()))
    engine = df.Engine(model, df.DiffusionSchedule(), sampler="ddim", steps=3)
    engine.sample((1, 1, 8, 8), torch.tensor([3]))
    assert calls == [4, 4, 4]
    assert engine.explain()["threads"] == "4 of 4"


def test_one_for_a_tiny_network_without_a_measurement(step: MakeStep) -> None:
    measured = step({4: 0.001, 2: 0.002, 1: 0.003})
    tiny = contest.Work("a network", lambda: CALLS, contest.FEW - 1)
    assert step_contest.threads_for(tiny, measured) == 1
    assert measured.calls == 0
    large = contest.Work("a network", lambda: CALLS, contest.FEW)
    assert step_contest.threads_for(large, measured) == 4
    model = df.UNet2DCondition(df.UNetConfig.preset("digits"))
    engine = df.Engine(model, df.DiffusionSchedule(), sampler="ddim", steps=3)
    engine.sample((1, 1, 8, 8), torch.tensor([3]))
    assert engine.explain()["threads"] == "1 of 4, for so small a network"
