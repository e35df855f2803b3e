"""Requests of every kind in one batch: each joins at the next step and leaves when it is done."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edits import Edit, Watch
from ..engine.batch import Batch
from ..engine.slots import Seat, Slots
from ..ops import checks
from .pending import InBatch, Pending
from .request import checked, job, result
from .result import Result
from .stable_diffusion import StableDiffusion

_LOG = logging.getLogger(__name__)
SIZES = 4  # sizes of image whose buffers are kept


class QueueFull(RuntimeError):
    """The queue of a batcher has no room; nothing was accepted."""


class BatcherClosed(RuntimeError):
    """The batcher accepts nothing more, or was closed before a request was done."""


@dataclass
class Statistics:
    """What a batcher did since it began.

    Attributes:
        steps: calls of the model.
        rows: model rows in them, without those that only fill up.
        images: images in them, as many as slots were occupied.
        seconds: time that the calls took, and what was done between them.
        accepted, finished, failed, cancelled: numbers of requests.
    """

    steps: int = 0
    rows: int = 0
    images: int = 0
    seconds: float = 0.0
    accepted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0


class Batcher:
    """A pipeline that serves many requests at once, in one batch whatever their settings are.

    Images in one batch need not share sampler, number of steps, guidance, prompt, strength or seed.
    An image is what the pipeline would draw by itself, to rounding, in any company. A thread of the
    batcher runs the steps; :meth:`submit` may be called by any thread.

    Args:
        pipe: the pipeline. Its weights and LoRAs may be changed while nothing is drawn.
        slots: the most images on their way.
        queue: the most requests that wait for a slot.
        max_steps: the most model calls of a request (Heun has two in a step).
        max_bytes: the most memory that pictures in waiting requests take.
        graph: ``"auto"`` for CUDA graphs where there can be any, or ``"off"``.
        rows: the numbers of rows of the model's batch to use; see
            :class:`~diffusion_fast.engine.slots.Slots`.

    Attributes:
        statistics: what it did so far.

    Raises:
        ValueError: an argument that can't be.

    Examples:
        >>> with df.Batcher(df.StableDiffusion.from_pretrained("tiny"), slots=2) as batcher:
        ...     pending = [batcher.submit("a cat", steps=2, size=64, seed=seed) for seed in (0, 1)]
        ...     [one.result().images[0].size for one in pending]
        [(64, 64), (64, 64)]
    """

    def __init__(
        self,
        pipe: StableDiffusion,
        *,
        slots: int = 8,
        queue: int = 64,
        max_steps: int = 150,
        max_bytes: int = 2**30,
        graph: str = "auto",
        rows: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("queue", queue), ("max_steps", max_steps)):
            checks.positive_int(name, value)
        self.pipe, self.slots, self.queue = pipe, slots, queue
        self.max_steps, self.max_bytes = max_steps, max_bytes
        self.statistics = Statistics()
        self._graph, self._rows = graph, rows
        self._watch = Watch()
        self._watch.look(pipe.unet)
        self._shared = self._make()
        self._stale = False  # whether the weights are others than those that it was made of
        device = self._shared.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: OrderedDict[tuple[int, int], Batch] = OrderedDict()
        self._waiting: deque[InBatch] = deque()
        self._running: dict[Seat, tuple[InBatch, tuple[int, int]]] = {}
        self._finished: deque[tuple[InBatch, Tensor, Seat]] = deque()
        self._turn = 0  # whose turn between two steps: 0 a join's, 1 a decode's
        self._condition = threading.Condition()
        self._closing = self._stopped = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="Batcher", daemon=True)
        self._thread.start()

    def submit(self, prompt: str, negative_prompt: str | None = None, **settings: Any) -> Pending:
        """Ask for one image.

        Args:
            prompt, negative_prompt: texts, as :class:`~diffusion_fast.StableDiffusion` takes them.
            settings: its keywords for one image: ``steps``, ``guidance_scale``, ``sampler``,
                ``seed``, ``size``, ``image``, ``mask``, ``strength``, ``clip_skip``, ``output`` and
                those of the sampler.

        Raises:
            TypeError, ValueError: an argument that can't be; the message names it.
            QueueFull: as many requests, or as many bytes of pictures, wait as may.
            BatcherClosed: it was closed, or its thread died.
        """
        return self.submit_all(
            [{"prompt": prompt, "negative_prompt": negative_prompt, **settings}]
        )[0]

    def submit_all(self, requests: Sequence[Mapping[str, Any]]) -> Sequence[Pending]:
        """Ask for several images: all are accepted, or none is.

        Args:
            requests: the arguments of :meth:`submit` for each.
        """
        made = [InBatch(checked(self.pipe, self.max_steps, **request)) for request in requests]
        with self._condition:
            if self._death is not None:
                raise BatcherClosed(f"the batcher's thread ended: {self._death!r}") from self._death
            if self._closing:
                raise BatcherClosed("the batcher was closed")
            room = self.queue - self.waiting
            if len(made) > room:
                got = f"{self.waiting} wait of at most {self.queue}"
                raise QueueFull(f"queue: expected room for {len(made)} requests, got {got}")
            taken = sum(one._request.bytes for one in self._waiting)
            if taken and taken + sum(one._request.bytes for one in made) > self.max_bytes:
                got = f"{taken} bytes that wait of at most {self.max_bytes}"
                raise QueueFull(f"queue: expected room for the pictures, got {got}")
            self._waiting.extend(made)
            self.statistics.accepted += len(made)
            self._condition.notify_all()
        for one in made:
            one.add_done_callback(self._ended)
        return made

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return sum(not one.done() for one in list(self._waiting))

    @property
    def occupied(self) -> int:
        """How many slots are occupied."""
        return self.slots - self._shared.free

    @property
    def alive(self) -> bool:
        """Whether it accepts requests."""
        return self._death is None and not self._closing

    def close(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and finish what was accepted.

        Args:
            timeout: seconds; what is not done then fails with :class:`BatcherClosed`. None for no
                limit, 0 to stop at once.

        Returns:
            Whether all was done.
        """
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        self._stopped = True
        with self._condition:
            self._condition.notify_all()
        self._thread.join()
        return False

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> Slots:
        return Slots(
            self.pipe.unet,
            slots=self.slots,
            max_rows=self.max_steps,
            rewrites=self.pipe._rewrites,
            graph=self._graph,
            sizes=self._rows,
        )

    def _ended(self, one: Future[Result]) -> None:
        """Counts a request that came to an end."""
        assert isinstance(one, InBatch)
        one.ended = time.monotonic()
        with self._condition:
            if one.cancelled():
                self.statistics.cancelled += 1
            elif one.exception() is not None:
                self.statistics.failed += 1
            else:
                self.statistics.finished += 1
            self._condition.notify_all()

    def _run(self) -> None:
        """The thread: between two steps at most one join or decode, if anything is on its way."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                while self._wait():
                    begun = time.monotonic()
                    self._drop_cancelled()
                    self._between()
                    while self._starting():
                        self._join()
                    self._step()
                    self.statistics.seconds += time.monotonic() - begun
        except BaseException as error:
            self._death = error
            _LOG.exception("the batcher's thread ended")
        finally:
            self._tell_all()

    def _wait(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._condition:
            while not self._stopped:
                for one in [one for one in self._waiting if one.cancelled()]:
                    self._waiting.remove(one)
                    one.set_running_or_notify_cancel()  # wakes who waits for several
                if self._running or self._finished or self._waiting:
                    return True
                if self._closing:
                    return False
                self._condition.wait()
        return False

    def _tell_all(self) -> None:
        """Every request that is still open learns that it will not be done."""
        with self._condition:
            self._closing = True
            left = [*self._waiting, *(one for one, _ in self._running.values())]
            left += [one for one, *_ in self._finished]
            self._waiting.clear()
        for one in left:
            if one.cancelled():
                one.set_running_or_notify_cancel()
                continue
            error = BatcherClosed("the batcher was closed before the request was done")
            if self._death is not None:
                error = BatcherClosed(f"the batcher's thread ended: {self._death!r}")
                error.__cause__ = self._death
            _fail(one, error)
        self._running.clear()

    def _drop_cancelled(self) -> None:
        for seat, (one, place) in list(self._running.items()):
            if one.cancelled():
                self._batches[place].leave(seat)
                del self._running[seat]
                one.set_running_or_notify_cancel()

    def _starting(self) -> bool:
        """Whether nobody would wait for a join: no image has made a step yet."""
        waits = bool(self._waiting)
        return waits and self._shared.free > 0 and all(seat.row == 0 for seat in self._running)

    def _between(self) -> None:
        """One join, one decode or one preview, in turn where there are several."""
        joins = bool(self._waiting) and self._shared.free > 0
        previews = [
            (seat, *place)
            for seat, place in self._running.items()
            if place[0]._wants_preview and place[0]._preview_row < seat.predicted == seat.row
        ]
        if joins and (self._turn == 0 or not self._finished):
            self._turn = 1
            self._join()
        elif self._finished:
            self._turn = 0
            self._decode(*self._finished.popleft())
        elif previews:
            seat, one, place = min(previews, key=lambda p: p[1]._preview_row - p[0].row)
            one._wants_preview = False
            self._draw_preview(seat, one, place)

    def _join(self) -> None:
        """The first request that waits joins the batch of its size; its own errors are its own."""
        with self._condition:
            one = self._waiting.popleft()
        if one.cancelled():
            one.set_running_or_notify_cancel()
            return
        one.started = time.monotonic()
        try:
            if not self._running:
                self._notice_edits()
            with self._aside():
                made, place = job(self.pipe, one._request)
            if self._side is not None:
                torch.cuda.current_stream(self._shared.device).wait_stream(self._side)
            batch = self._batch(place)
            seat = self._shared.take(made)
            try:
                batch.join(seat)
            except BaseException:
                self._shared.give_back(seat)
                raise
        except Exception as error:
            _fail(one, error)
            return
        self._running[seat] = one, place
        one._seat = seat

    def _batch(self, place: tuple[int, int]) -> Batch:
        """The batch of a size of latents; the one that was idle for longest makes way."""
        if place not in self._batches:
            idle = [other for other, batch in self._batches.items() if not len(batch)]
            for other in idle[: max(0, len(self._batches) - SIZES + 1)]:
                if self._shared.graphs is not None:
                    self._shared.graphs.drop(self._batches[other])
                del self._batches[other]
            channels = self.pipe.unet.config.out_channels
            self._batches[place] = Batch(self._shared, (channels, *place))
        return self._batches[place]

    def _step(self) -> None:
        """One step of the batch whose turn it is: sizes take turns."""
        for place, batch in list(self._batches.items()):
            if not len(batch):
                continue
            self._batches.move_to_end(place)
            statistics = self.statistics
            statistics.steps += 1
            statistics.images += len(batch)
            statistics.rows += sum(len(seat.halves) for seat in batch.seats)
            looked = any(self._running[seat][0]._wants_preview for seat in batch.seats)
            for seat in batch.step(looked):
                one, _ = self._running.pop(seat)
                one._decoding = True
                self._finished.append((one, batch.leave(seat), seat))
            if self._side is not None:
                self._side.wait_stream(torch.cuda.current_stream(self._shared.device))
            return

    def _decode(self, one: InBatch, latents: Tensor, seat: Seat) -> None:
        if one.cancelled():
            one.set_running_or_notify_cancel()
            return
        try:
            with self._aside():
                seat.check_finite()
                made = result(self.pipe, one._request, latents)
        except Exception as error:
            _fail(one, error)
        else:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                one.set_result(made)

    def _draw_preview(self, seat: Seat, one: InBatch, place: tuple[int, int]) -> None:
        """The image that the last step predicts, noise left out."""
        from ..images import to_pil  # imports Pillow

        latents = self._batches[place].estimate(seat)
        assert latents is not None  # the step wrote it
        one._preview_row = seat.row
        try:
            images, _ = self.pipe._decoded(self.pipe._autoencoding(), latents.nan_to_num())
        except Exception:  # the image itself may still be drawn
            _LOG.exception("a preview failed")
        else:
            one._preview = to_pil(images)[0]

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On a GPU, a stream beside that of the steps: the last one runs on meanwhile."""
        with contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side):
            yield

    def _notice_edits(self) -> None:
        """Nothing is drawn now: what was derived from other weights is made anew.

        Raises:
            ValueError: the pipeline's network became one that a batch can't have. It is tried again
                with the next request.
        """
        if self._watch.look(self.pipe.unet) is not Edit.NONE:
            self._stale = True
        if self._stale:
            self._batches.clear()
            self._shared = self._make()
            self._stale = False


def _fail(one: InBatch, error: BaseException) -> None:
    """Tell a request of its error, unless it was cancelled meanwhile."""
    with contextlib.suppress(InvalidStateError):
        one.set_exception(error)
