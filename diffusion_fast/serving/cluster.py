"""The server as an application of Ray Serve: one ingress, and a replica of the model for each GPU.

``diffusion-fast serve --ray`` runs it; a config file of Ray Serve names :func:`application`. Needs
the extra ``diffusion-fast[ray]``.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import ray
from ray import serve

from ..pipelines import Batcher
from .app import create_app
from .gate import Gate, log_as_json
from .model import Model, warm_up
from .replicas import Done, Drawing, Load, Now, Replicas
from .service import Service
from .settings import Settings

NAME = "diffusion-fast"  # of the application
HEALTH = 2.0  # seconds between two looks at a replica


class Replica:
    """The model with its batcher, warmed up, in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        log_as_json()
        pipe, loras = settings.load()
        self._model = Model.of(pipe, settings.served_name, loras)
        self._batcher = Batcher(
            pipe,
            slots=settings.slots,
            queue=settings.queue,
            max_steps=settings.max_steps,
            graph=settings.graph,
        )
        self._drawing = Drawing(self._batcher)
        warm_up(self._batcher, self._model, settings.timeout)

    def model(self) -> Model:
        return self._model

    def load(self) -> Load:
        return self._drawing.load()

    def look(self, call: str, image: int) -> None:
        self._drawing.look(call, image)

    async def draw(
        self, call: str, requests: Sequence[Mapping[str, Any]]
    ) -> AsyncIterator[Now | Done]:
        async for event in self._drawing.draw(call, requests):
            yield event

    def check_health(self) -> None:
        """Called by Ray Serve, which starts another one in place of one whose batcher died."""
        if not self._batcher.alive:
            raise RuntimeError("the batcher's thread ended")

    def __del__(self) -> None:
        if hasattr(self, "_batcher"):
            self._batcher.close(0)


@serve.ingress()
class Ingress:
    """The HTTP server: what every request passes, both APIs and the page."""

    async def __init__(self, replicas: Any, settings: Settings) -> None:  # type: ignore[misc]
        log_as_json()
        self._settings = settings
        self._model = await replicas.model.remote()
        self._replicas = Replicas(replicas, asyncio.get_running_loop())

    def __serve_build_asgi_app__(self) -> Gate:
        settings = self._settings
        return create_app(
            Service(self._model, self._replicas, settings.limits),
            token=settings.token,
            hosts=settings.allow_host,
            origins=settings.allow_origin,
        )


def application(settings: Settings) -> serve.Application:
    """The application, for ``serve.run`` and for config files: ``import_path:
    diffusion_fast.serving.cluster:application`` with the settings as ``args``."""
    ongoing = settings.slots + settings.queue
    most = settings.max_replicas or settings.replicas
    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if most > settings.replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": most,
                "target_ongoing_requests": settings.slots,
            }
        }
    told = settings.model_copy(update={"replicas": 1, "max_replicas": None})  # so that a change
    # of their number is none of theirs, for which they would be started anew
    on_gpu = settings.device.startswith("cuda")
    model: Any = serve.deployment(  # its types know decorators alone
        Replica,
        name="model",
        ray_actor_options={"num_gpus": 1} if on_gpu else {"num_cpus": 1},
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=HEALTH,
        **scale,
    )
    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,  # it knows whose requests are whose
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000 + most * ongoing,  # it has bounds of its own
        graceful_shutdown_timeout_s=settings.drain,
    )
    made: serve.Application = ingress.bind(model.bind(told), told)
    return made


def serve_until_stopped(settings: Settings, host: str, port: int) -> None:
    """Run the application on the Ray cluster that there is, or else on this machine's own; until
    SIGTERM or SIGINT, which finish what runs."""
    ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray's own, and before the first request
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(application(settings), name=NAME)
        stopped.wait()
        serve.delete(NAME)  # waits for what runs, as long as it may
    finally:
        serve.shutdown()
        ray.shutdown()
