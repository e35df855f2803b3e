"""Batchers in other processes, behind a handle of Ray Serve, as one that draws."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from ..pipelines import Batcher, BatcherClosed, Pending, QueueFull
from ..pipelines.batcher import Statistics
from ..pipelines.pending import Progress
from ..pipelines.result import Result

LOG = logging.getLogger("diffusion_fast.serve")
LOOKS = 2.0  # seconds for which a preview is drawn anew after somebody looked
FRESH = 0.5  # seconds for which the numbers of replicas are not asked for again
ANSWER = 2.0  # seconds that a replica has to tell them
PERIOD = 0.1  # seconds between two looks at how far images are
TRIES = 2  # of a request, at different replicas


@dataclass(frozen=True)
class Now:
    """How far the images of a call are; the pictures so far of those that changed."""

    progress: list[Progress]
    previews: dict[int, Any]


@dataclass(frozen=True)
class Done:
    """The end of one image of a call.

    Attributes:
        image: which.
        outcome: its result, or why there is none.
        queued: seconds until it joined a batch; None if it never did.
    """

    image: int
    outcome: Result | Exception
    queued: float | None = None


@dataclass(frozen=True)
class Load:
    """Numbers of one replica, as a batcher has them."""

    replica: str
    slots: int = 0
    occupied: int = 0
    waiting: int = 0
    alive: bool = False
    statistics: Statistics = field(default_factory=Statistics)


class Drawing:
    """The side of a replica: a batcher whose requests come and go as messages."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.replica = secrets.token_hex(8)
        self._looked: dict[tuple[str, int], float] = {}

    def load(self) -> Load:
        batcher = self.batcher
        numbers = batcher.slots, batcher.occupied, batcher.waiting, batcher.alive
        return Load(self.replica, *numbers, dataclasses.replace(batcher.statistics))

    def look(self, call: str, image: int) -> None:
        """Somebody looks at an image of a call, if that is here: draw its preview."""
        if (call, image) in self._looked:
            self._looked[call, image] = time.monotonic()

    async def draw(
        self, call: str, requests: Sequence[Mapping[str, Any]]
    ) -> AsyncIterator[Now | Done]:
        """Draw images; who stops to listen cancels them.

        Args:
            call: a name of its own.
            requests: the arguments of :meth:`Batcher.submit <diffusion_fast.Batcher.submit>`.
        """
        try:
            pending = await asyncio.to_thread(self.batcher.submit_all, requests)
        except Exception as error:
            for i in range(len(requests)):
                yield Done(i, error)
            return
        told: list[Progress] = []
        seen: dict[int, Any] = {}
        left = {asyncio.wrap_future(one): i for i, one in enumerate(pending)}
        try:
            self._looked |= dict.fromkeys(((call, i) for i in left.values()), -LOOKS)
            while left:
                now = [one.progress for one in pending]
                previews = self._previews(call, pending, list(left.values()), seen)
                if now != told or previews:
                    yield Now(now, previews)
                told = now
                seen |= previews
                ended, _ = await asyncio.wait(
                    left, timeout=PERIOD, return_when=asyncio.FIRST_COMPLETED
                )
                for one in ended:
                    i = left.pop(one)
                    yield self._done(i, pending[i])
        finally:
            for i, each in enumerate(pending):
                each.cancel()
                self._looked.pop((call, i), None)

    def _previews(
        self, call: str, pending: Sequence[Pending], left: list[int], seen: dict[int, Any]
    ) -> dict[int, Any]:
        since = time.monotonic() - LOOKS
        drawn = {i: pending[i].preview() for i in left if self._looked[call, i] > since}
        return {i: one for i, one in drawn.items() if one is not None and one is not seen.get(i)}

    def _done(self, i: int, one: Pending) -> Done:
        queued = None if one.started is None else one.started - one.submitted
        error = BatcherClosed("cancelled") if one.cancelled() else one.exception()
        if error is not None:
            return Done(i, error if isinstance(error, Exception) else BatcherClosed(repr(error)))
        result = one.result()
        return Done(i, dataclasses.replace(result, latents=result.latents.cpu()), queued)


class Remote(Pending):
    """One that a replica draws, which tells how far it is."""

    def __init__(self, call: _Call, number: int, steps: int) -> None:
        super().__init__()
        self._call, self._number = call, number
        self._progress = Progress("queued", 0, steps)
        self._preview: Any = None

    @property
    def progress(self) -> Progress:
        now = self._progress
        return Progress("done", now.steps, now.steps) if self.done() else now

    def preview(self) -> Any:
        if not self.done():
            self._call.look(self._number)
        return self._preview


class _Call:
    """Images that one request asked for: they are drawn by one replica, or by a second one where
    that dies; each gets one result.

    Everything but :meth:`look` runs on the loop.
    """

    def __init__(
        self, handle: Any, loop: asyncio.AbstractEventLoop, requests: Sequence[Mapping[str, Any]]
    ) -> None:
        self.name = secrets.token_hex(8)
        self.accepted = False  # by a replica
        self._handle, self._loop, self._requests = handle, loop, requests
        self._looked = [-LOOKS] * len(requests)
        self.images = [Remote(self, i, one.get("steps") or 1) for i, one in enumerate(requests)]
        self._left = len(self.images)
        self._order: Sequence[int] = ()  # those that a replica was asked for, as it counts them
        self._task: asyncio.Task[None] | None = None

    def look(self, image: int) -> None:
        """Ask for a preview, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._looked[image] > LOOKS / 2 and image in self._order:
            self._looked[image] = now
            ask = self._handle.broadcast("look", self.name, self._order.index(image))
            asyncio.run_coroutine_threadsafe(_quietly(ask), self._loop)

    def start(self) -> None:
        self._task = self._loop.create_task(self._run())
        for one in self.images:
            one.add_done_callback(self._ended)

    def _ended(self, one: Any) -> None:
        """An image is done or cancelled; in any thread."""
        one.ended = time.monotonic()
        self._loop.call_soon_threadsafe(self._count)

    def _count(self) -> None:
        self._left -= 1
        if not self._left and self._task is not None:
            self._task.cancel()  # nobody waits for anything any more

    async def _run(self) -> None:
        error: Exception = BatcherClosed("no replica")
        for attempt in range(TRIES):
            left = [i for i, one in enumerate(self.images) if not one.done()]
            try:
                error = await self._listen(left)
            except BackPressureError as full:
                error = QueueFull(f"queue: expected room, got {full}")
                break
            except DeploymentUnavailableError as away:
                error = BatcherClosed(str(away))
                break
            except (RayTaskError, TaskCancelledError) as own:
                error = own
                break
            except (RayError, ReplicaUnavailableError) as died:
                error = BatcherClosed(f"the replica died: {died!r:.200}")
            if all(one.done() for one in self.images):
                return
            LOG.warning("a replica died", extra={"facts": {"call": self.name, "try": attempt + 1}})
        for one in self.images:
            self._end(one, error)

    async def _listen(self, left: Sequence[int]) -> Exception:
        """Have some of the images drawn by a replica.

        Returns:
            What became of those that have no result then: its batcher died or was closed.
        """
        error: Exception = BatcherClosed("the replica's answer has no end")
        self._order = left
        stream = self._handle.options(stream=True).draw.remote(
            self.name, [self._requests[i] for i in left]
        )
        try:
            async for event in stream:
                self.accepted = True
                if isinstance(event, Now):
                    for i, progress in zip(left, event.progress, strict=True):
                        self.images[i]._progress = progress
                    for i, preview in event.previews.items():
                        self.images[left[i]]._preview = preview
                    continue
                one = self.images[left[event.image]]
                if event.queued is not None:
                    one.started = one.submitted + event.queued
                if isinstance(event.outcome, BatcherClosed):
                    error = event.outcome
                else:
                    self._end(one, event.outcome)
        finally:
            stream.cancel()  # of no effect at its end
        return error

    def _end(self, one: Remote, outcome: Result | Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            if isinstance(outcome, Exception):
                one.set_exception(outcome)
            else:
                one.set_result(outcome)


async def _quietly(ask: Any) -> None:
    """Wait for a message to all replicas; it does not matter whether it arrived."""
    with contextlib.suppress(RayError, DeploymentUnavailableError, TimeoutError):
        await ask.results_async(timeout_s=ANSWER, return_exceptions=True)


class Replicas:
    """What draws is behind a handle: a :class:`~.model.Drawer` of several batchers.

    A request goes to the replica with the shorter queue of two, as Ray Serve has it. Where that
    dies, what has no result yet is asked for once more, with the same seeds.

    Args:
        handle: of the deployment.
        loop: where calls are waited for.
    """

    def __init__(self, handle: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._handle, self._loop = handle, loop
        self._calls: set[_Call] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._asked = -FRESH
        self._now: list[Load] = []
        self._ever: dict[str, Statistics] = {}  # of all replicas that ever were: counters only grow

    def submit_all(self, requests: Sequence[Mapping[str, Any]]) -> Sequence[Pending]:
        """Ask for several images; what can't be is told by their futures.

        Raises:
            BatcherClosed: it was closed.
        """
        if self._closed:
            raise BatcherClosed("the server ends")
        call = _Call(self._handle, self._loop, [dict(one) for one in requests])
        self._calls.add(call)
        left = len(call.images)

        def forget(_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                self._calls.discard(call)

        for one in call.images:
            one.add_done_callback(forget)
        self._loop.call_soon_threadsafe(call.start)
        return call.images

    def close(self, timeout: float | None = None) -> bool:
        """Accept nothing more; what is not done fails."""
        self._closed = True
        calls = list(self._calls)
        for call in calls:
            for one in call.images:
                call._end(one, BatcherClosed("the server was closed before the request was done"))
        return not calls

    def loads(self) -> list[Load]:
        """Those of the replicas that answer."""
        with self._lock:
            if time.monotonic() - self._asked < FRESH:
                return self._now
            try:
                ask = self._handle.broadcast("load")
                answers = ask.results(timeout_s=ANSWER, return_exceptions=True)
            except (RayError, DeploymentUnavailableError, TimeoutError):
                answers = []
            self._now = [one for one in answers if isinstance(one, Load)]
            self._ever |= {one.replica: one.statistics for one in self._now}
            self._asked = time.monotonic()
            return self._now

    @property
    def slots(self) -> int:
        return sum(one.slots for one in self.loads())

    @property
    def occupied(self) -> int:
        return sum(one.occupied for one in self.loads())

    @property
    def waiting(self) -> int:
        """Those in the queues of replicas, and those that no replica took yet."""
        here = sum(len(call.images) for call in list(self._calls) if not call.accepted)
        return here + sum(one.waiting for one in self.loads())

    @property
    def alive(self) -> bool:
        return not self._closed and any(one.alive for one in self.loads())

    @property
    def statistics(self) -> Statistics:
        self.loads()
        names = [one.name for one in dataclasses.fields(Statistics)]
        every = list(self._ever.values())
        return Statistics(**{name: sum(getattr(one, name) for one in every) for name in names})
