"""One drawer of several: a replica that dies, refuses, is looked at or listened to no more.

The handle here is a stand-in that calls :class:`Drawing` in this process; test_cluster.py has a
real one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from numerics import assert_close

pytest.importorskip("ray", reason="ray is not installed: pip install 'diffusion-fast[ray]'")

from ray.exceptions import ActorDiedError

from diffusion_fast import Batcher, StableDiffusion
from diffusion_fast.pipelines import BatcherClosed, QueueFull
from diffusion_fast.serving.replicas import Done, Drawing, Replicas

ASKED = {"size": 64, "output": "latent", "steps": 4}
LONG = {**ASKED, "steps": 149}
TIMEOUT = 30


class Stream:
    """An answer that comes in pieces, and can be cancelled."""

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self.events, self.task = events, asyncio.current_task()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.events

    def cancel(self) -> None:
        asyncio.get_running_loop().create_task(self.events.aclose())  # type: ignore[attr-defined]


class Answers:
    """What all replicas say."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    async def results_async(self, **_: Any) -> list[Any]:
        return self.values

    def results(self, **_: Any) -> list[Any]:
        return self.values


class Handle:
    """Replicas in this process; calls go to them in turn."""

    def __init__(self, replicas: list[Drawing]) -> None:
        self.replicas, self.calls = replicas, 0
        self.dies: Callable[[int, int], bool] = lambda call, events: False
        self.asked: list[int] = []  # how many images, of each call

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def draw(self) -> Handle:
        return self

    def remote(self, name: str, requests: list[Any]) -> Stream:
        self.asked.append(len(requests))
        return Stream(self._events(name, requests))

    async def _events(self, name: str, requests: list[Any]) -> AsyncIterator[Any]:
        call, self.calls = self.calls, self.calls + 1
        events = 0
        drawn = self.replicas[call % len(self.replicas)].draw(name, requests)
        try:
            async for event in drawn:
                events += isinstance(event, Done)
                yield event
                if self.dies(call, events):
                    raise ActorDiedError()
        finally:
            await drawn.aclose()  # type: ignore[attr-defined]

    def broadcast(self, name: str, *given: Any) -> Answers:
        return Answers([getattr(one, name)(*given) for one in self.replicas])


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion.from_pretrained("tiny", dtype=torch.float64)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()


@pytest.fixture
def handle(pipe: StableDiffusion) -> Iterator[Handle]:
    with Batcher(pipe, slots=2, queue=4) as one, Batcher(pipe, slots=2, queue=4) as other:
        yield Handle([Drawing(one), Drawing(other)])
        one.close(0)
        other.close(0)


@pytest.fixture
def both(handle: Handle, loop: asyncio.AbstractEventLoop) -> Replicas:
    return Replicas(handle, loop)


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_images_are_what_they_are_alone(both: Replicas, pipe: StableDiffusion) -> None:
    asked = [{"prompt": "a cat", "seed": seed, **ASKED} for seed in (1, 2)]
    pending = [one for each in asked for one in both.submit_all([each])]
    for one, how in zip(pending, asked, strict=True):
        assert_close(one.result(TIMEOUT).latents, pipe(**how).latents)
        assert one.started is not None
        assert one.progress.part == 1
    wait_for(lambda: both.statistics.finished == 2)
    assert [one.statistics.finished for one in both.loads()] == [1, 1]
    assert both.slots == 4
    assert both.alive


def test_a_replica_that_dies(both: Replicas, handle: Handle, pipe: StableDiffusion) -> None:
    """What it had not drawn yet is drawn by another one, with the same seeds, and only that."""
    handle.dies = lambda call, done: call == 0 and done == 1
    asked = [
        {"prompt": "a cat", "seed": 1, **ASKED},
        {"prompt": "a cat", "seed": 2, **ASKED, "steps": 40},
    ]
    pending = both.submit_all(asked)
    for one, how in zip(pending, asked, strict=True):
        assert_close(one.result(TIMEOUT).latents, pipe(**how).latents)
    assert handle.asked == [2, 1]


def test_replicas_that_die_twice(both: Replicas, handle: Handle) -> None:
    handle.dies = lambda call, done: True
    [one] = both.submit_all([{"prompt": "a cat", **LONG}])
    with pytest.raises(BatcherClosed, match="the replica died: ActorDiedError"):
        one.result(TIMEOUT)
    assert handle.calls == 2


def test_a_batcher_that_dies(both: Replicas, handle: Handle, pipe: StableDiffusion) -> None:
    """Its replica lives still, and says so."""
    handle.replicas[0].batcher.close(0)
    how = {"prompt": "a cat", "seed": 3, **ASKED}
    [one] = both.submit_all([how])
    assert_close(one.result(TIMEOUT).latents, pipe(**how).latents)
    assert handle.calls == 2
    assert [one.alive for one in both.loads()] == [False, True]
    assert both.alive


@pytest.mark.parametrize(
    ("requests", "error", "message"),
    [
        ([{"prompt": "a cat", "steps": 0}], ValueError, "steps: expected a positive integer"),
        ([{"prompt": "a cat", **LONG}] * 5, QueueFull, "queue: expected room for 5 requests"),
        (
            [{"prompt": "a cat", **ASKED, "guidance_scale": 1e308}],
            FloatingPointError,
            "expected finite outputs",
        ),
    ],
)
def test_errors_are_those_of_the_batcher(
    both: Replicas, handle: Handle, requests: list[Any], error: type[Exception], message: str
) -> None:
    """And a request that is refused is not asked for again."""
    for one in both.submit_all(requests):
        with pytest.raises(error, match=message):
            one.result(TIMEOUT)
    assert handle.calls == 1


def test_progress_preview_and_cancel(both: Replicas, handle: Handle) -> None:
    [one] = both.submit_all([{"prompt": "a cat", **LONG}])
    wait_for(lambda: one.preview() is not None)
    assert one.preview().size == (64, 64)
    assert 0 < one.progress.step < 149
    assert one.progress.steps == 149
    assert both.occupied == 1
    assert one.cancel()
    with pytest.raises(CancelledError):
        one.result(TIMEOUT)
    batcher = handle.replicas[0].batcher
    wait_for(lambda: batcher.statistics.cancelled == 1 and not batcher.occupied)
    assert handle.replicas[0]._looked == {}
    assert not both._calls


def test_no_preview_is_drawn_that_nobody_looks_at(both: Replicas, handle: Handle) -> None:
    batcher = handle.replicas[0].batcher
    [one] = both.submit_all([{"prompt": "a cat", **LONG}])
    wait_for(lambda: one.progress.step > 3)
    assert not any(each._preview for each, _ in batcher._running.values())
    one.cancel()


def test_closing_tells_all(both: Replicas) -> None:
    [one] = both.submit_all([{"prompt": "a cat", **LONG}])
    assert not both.close(0)
    with pytest.raises(BatcherClosed, match="before the request was done"):
        one.result(TIMEOUT)
    with pytest.raises(BatcherClosed, match="the server ends"):
        both.submit_all([{"prompt": "a cat"}])
    assert not both.alive


def test_counters_outlive_their_replica(both: Replicas, handle: Handle) -> None:
    both.submit_all([{"prompt": "a cat", **ASKED}])[0].result(TIMEOUT)
    wait_for(lambda: both.statistics.finished == 1)
    handle.replicas.pop(0)
    wait_for(lambda: both.slots == 2)
    assert both.statistics.finished == 1
