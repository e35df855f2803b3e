"""What the interfaces share: requests in, pictures out, whose they are and how far."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..images import PARAMETERS
from ..pipelines import Batcher, BatcherClosed, Pending, QueueFull, StableDiffusion
from ..pipelines.infotext import infotext
from .limits import FieldError, Limits, Refused
from .metrics import Metrics
from .model import Drawer, Model, warm_up
from .pictures import Files

TASKS = 1024  # that are remembered
_LORA = re.compile(r"<lora:([^:>]+)(?::([^:>]+))?[^>]*>")


@dataclass
class Task:
    """Images that one HTTP request asked for.

    Attributes:
        id: its name, the client's own or a random one.
        caller: whose it is.
        pending: the images to come.
        begun: when, by the monotonic clock.
    """

    id: str
    caller: str
    pending: Sequence[Pending]
    begun: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        return all(one.done() for one in self.pending)

    def cancel(self) -> None:
        for one in self.pending:
            one.cancel()


@dataclass(frozen=True)
class Drawn:
    """A picture and what made it; its ``info`` has the settings as text."""

    image: Image.Image
    seed: int
    text: str


class Service:
    """A model behind an HTTP server.

    Args:
        model: what there is to tell of it.
        drawer: what draws.
        limits: what clients may ask for.

    Attributes:
        name, loras: of the model.
        ready: whether it was warmed up.
    """

    def __init__(self, model: Model, drawer: Drawer, limits: Limits | None = None) -> None:
        self.model, self.drawer, self.limits = model, drawer, limits or Limits()
        self.name, self.loras = model.name, model.loras
        self.metrics = Metrics(drawer)
        self.files = Files(self.limits)
        self.created = int(time.time())
        self.ready = False
        self._tasks: OrderedDict[tuple[str, str], Task] = OrderedDict()

    @classmethod
    def of(
        cls,
        pipe: StableDiffusion,
        *,
        name: str,
        loras: Mapping[str, float] | None = None,
        slots: int = 8,
        limits: Limits | None = None,
        graph: str = "auto",
    ) -> Service:
        """A pipeline's, drawn by a batcher in this process.

        Args:
            pipe: the pipeline, its LoRAs loaded.
            name: the name that clients know the model by.
            loras: scales of the LoRAs by their names.
            slots, graph: as :class:`~diffusion_fast.Batcher` takes them.
            limits: what clients may ask for.
        """
        limits = limits or Limits()
        batcher = Batcher(
            pipe, slots=slots, queue=limits.queue, max_steps=limits.steps, graph=graph
        )
        return cls(Model.of(pipe, name, loras), batcher, limits)

    def warm_up(self) -> None:
        """Draw one image; the service is ready then."""
        warm_up(self.drawer, self.model, self.limits.timeout)
        self.ready = True

    def check_model(self, field: str, name: str | None) -> None:
        """Raise FieldError unless a request means the model that is served."""
        if name not in (None, "", self.name):
            raise FieldError(field, f"expected {self.name!r}, which is served, got {name!r:.80}")

    def without_loras(self, field: str, prompt: str) -> str:
        """A prompt without the names of the LoRAs that are on for all.

        Raises:
            FieldError: a LoRA that is not, or another scale of one.
        """
        for name, scale in _LORA.findall(prompt):
            if name not in self.loras:
                known = ", ".join(map(repr, self.loras)) or "none, as none is loaded"
                raise FieldError(
                    field, f"expected a LoRA that is loaded ({known}), got {name!r:.80}"
                )
            try:
                same = not scale or float(scale) == self.loras[name]
            except ValueError:
                same = False
            if not same:
                fixed = f"{name}:{self.loras[name]:g}"
                raise FieldError(field, f"expected the fixed <lora:{fixed}>, got {scale!r:.20}")
        return _LORA.sub("", prompt)

    def check_size(self, field: str, width: int, height: int) -> tuple[int, int]:
        """(height, width), unless it is larger than may be."""
        limits = self.limits
        if max(width, height) > limits.side or width * height > limits.pixels:
            expected = f"sides of at most {limits.side} and {limits.pixels} pixels"
            raise FieldError(field, f"expected {expected}, got {width}x{height}")
        return height, width

    def check_count(self, field: str, count: int) -> None:
        if not 1 <= count <= self.limits.batch:
            raise FieldError(field, f"expected 1 to {self.limits.batch} images, got {count}")

    def check_prompt(self, field: str, prompt: str) -> None:
        if len(prompt) > self.limits.prompt:
            expected = f"at most {self.limits.prompt} characters"
            raise FieldError(field, f"expected {expected}, got {len(prompt)}")

    async def draw(
        self,
        requests: Sequence[Mapping[str, Any]],
        *,
        caller: str,
        gone: Callable[[], Awaitable[bool]],
        fields: Mapping[str, str],
        task_id: str | None = None,
    ) -> list[Drawn]:
        """Draw images; those that are interrupted are left out.

        Args:
            requests: the arguments of :meth:`Batcher.submit <diffusion_fast.Batcher.submit>` for
                each.
            caller: whose request it is.
            gone: whether the client has gone, which cancels.
            fields: names of fields by the batcher's arguments, for errors.
            task_id: the client's own name of the request.

        Raises:
            FieldError: an argument that can't be.
            Refused: a full queue, a closed server, a client that has gone, too long a wait.
            FloatingPointError: the model's output was not finite.
        """
        key = caller, task_id or secrets.token_hex(8)
        if key in self._tasks and not self._tasks[key].done:
            raise FieldError(
                "force_task_id", "expected a name of no request that runs, got it twice"
            )
        task: Task | None = None
        try:
            pending = await asyncio.to_thread(self.drawer.submit_all, requests)
            task = self._tasks[key] = Task(key[1], caller, pending)
            self._forget_tasks()
            await self._wait(task, gone)
            return [self._drawn(one) for one in pending if not one.cancelled()]
        except (QueueFull, BatcherClosed) as error:
            raise Refused(503, str(error)) from error
        except (ValueError, TypeError) as error:
            raise named(error, fields) from error
        finally:
            if task is not None:
                task.cancel()  # what is not done yet: nobody waits for it any more

    async def _wait(self, task: Task, gone: Callable[[], Awaitable[bool]]) -> None:
        until = task.begun + self.limits.timeout
        waiting = {asyncio.wrap_future(one) for one in task.pending}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=0.2)
                for one in done:  # its error is told later, by the image itself
                    _ = one.cancelled() or one.exception()
                if waiting and await gone():
                    raise Refused(499, "the client has gone")
                if waiting and time.monotonic() > until:
                    raise Refused(504, f"not done in {self.limits.timeout:g} seconds")
        finally:
            for one in waiting:
                one.cancel()

    def _drawn(self, one: Pending) -> Drawn:
        try:
            result = one.result(0)
        except CancelledError:
            raise Refused(499, "interrupted") from None
        self.metrics.observe(one)
        prompt, negative = result.settings["prompt"][0], result.settings["negative_prompt"]
        text = infotext(
            result.settings, result.seeds[0], prompt, negative, model=self.name, loras=self.loras
        )
        images: Any = result.images
        images[0].info[PARAMETERS] = text
        return Drawn(images[0], result.seeds[0], text)

    def tasks_of(self, caller: str, task_id: str | None = None) -> list[Task]:
        """The caller's requests that are not done, or the one of this name, the oldest first."""
        if task_id is not None:
            task = self._tasks.get((caller, task_id))
            return [] if task is None else [task]
        return [task for task in self._tasks.values() if task.caller == caller and not task.done]

    def _forget_tasks(self) -> None:
        for key in [key for key, task in self._tasks.items() if task.done]:
            if len(self._tasks) <= TASKS:
                return
            del self._tasks[key]


def named(error: Exception, fields: Mapping[str, str]) -> Exception:
    """An error of the batcher's with the field that it means: its message begins with one."""
    name, colon, message = str(error).partition(": ")
    if not colon or not re.fullmatch(r"[\w, ]+", name):
        return error
    return FieldError(fields.get(name, name), message)
