"""Throughput of a server on Ray Serve by the number of its replicas, through HTTP."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx

CLIENTS = 16  # requests on their way at a time


async def _asked(url: str, bodies: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds that each request took; so many at a time."""
    left = list(enumerate(bodies))[::-1]
    took = [0.0] * len(bodies)

    async def client(one: httpx.AsyncClient) -> None:
        while left:
            i, body = left.pop()
            begun = time.perf_counter()
            answer = await one.post(url + "/v1/images/generations", json=body)
            answer.raise_for_status()
            took[i] = time.perf_counter() - begun

    async with httpx.AsyncClient(timeout=300) as one:
        await asyncio.gather(*(client(one) for _ in range(CLIENTS)))
    return took


def throughput(
    replicas: Sequence[int], bodies: Sequence[dict[str, Any]], slots: int, runs: int
) -> list[dict[str, Any]]:
    """Images per second and latency with each number of replicas, on a Ray of this machine.

    Each replica has one core. The numbers of replicas take turns; the median of the runs counts.

    Args:
        replicas: their numbers.
        bodies: of requests to ``/v1/images/generations``.
        slots: of each replica.
        runs: how often.
    """
    import ray
    from ray import serve

    from diffusion_fast.serving.cluster import application
    from diffusion_fast.serving.settings import Settings

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    found: dict[int, list[dict[str, float]]] = {count: [] for count in replicas}
    most = max(replicas)
    ray.init(address="local", num_cpus=most, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for _ in range(runs):
            for count in replicas:
                settings = Settings(model="emoji", replicas=count, slots=slots)
                serve.run(application(settings))
                while httpx.get(url + "/queue", timeout=60).json()["slots"] != slots * count:
                    time.sleep(0.2)
                asyncio.run(_asked(url, bodies[: 2 * slots]))  # what is done once
                begun = time.perf_counter()
                took = sorted(asyncio.run(_asked(url, bodies)))
                seconds = time.perf_counter() - begun
                found[count].append(
                    {
                        "images_per_s": len(bodies) / seconds,
                        "p50_s": statistics.median(took),
                        "p95_s": took[int(0.95 * (len(took) - 1))],
                    }
                )
    finally:
        serve.shutdown()
        ray.shutdown()
    return [
        {"replicas": count, "requests": len(bodies)}
        | {name: float(f"{statistics.median(r[name] for r in rows):.4g}") for name in rows[0]}
        for count, rows in found.items()
    ]
