"""A server of the tiny model, on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from diffusion_fast import StableDiffusion
from diffusion_fast.serving import Limits, Service, create_app

LIMITS = Limits(steps=400, side=256, batch=4, queue=16, body=2**20, picture_pixels=512 * 512)


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: where.
        service: what is behind it.
        pipe: the same model, for pictures to compare with.
    """

    url: str
    service: Service
    pipe: StableDiffusion

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    pipe = StableDiffusion.from_pretrained("tiny")
    service = Service.of(pipe, name="tiny", loras={"style": 0.5}, slots=4, limits=LIMITS)
    config = uvicorn.Config(create_app(service), port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not (server.started and service.ready):
        assert time.monotonic() < until
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}", service, pipe)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
    assert not service.drawer.alive
