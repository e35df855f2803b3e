"""A server under clients of every kind, for as long as one likes.

    python -m benchmarks.soak_serving --seconds 600 --log soak.log

Good requests, broken ones, clients that go away, that stop what they asked for, that send their
body a byte at a time, all at random. Now and then a line says how much memory the process takes and
what became of the requests. It fails where memory grows, where a slot stays occupied, where a
request is never answered, or where an answer is none of those that the docs list.
"""

from __future__ import annotations

import argparse
import collections
import gc
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import httpx
import uvicorn

import diffusion_fast as df
from diffusion_fast.serving import Limits, Service, create_app

SAMPLERS = ("ddim", "heun", "Euler a", "DPM++ 2M Karras", "unipc", "lcm")
GROWTH = 64 * 2**20  # bytes that memory may grow by after the first third
SETTLED = 60.0  # seconds from which on memory is looked at
WAIT = 60.0  # seconds within which everything is answered


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """A server on a port of its own, warmed up; its URL."""
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 120
    while not (server.started and service.ready):
        if time.monotonic() > until:
            raise TimeoutError("the server did not get ready")
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(WAIT)


def body(chance: random.Random) -> dict[str, Any]:
    """A good request."""
    return {
        "prompt": chance.choice(["a cat", "a (dog:1.2) " * chance.randint(1, 30), ""]),
        "negative_prompt": chance.choice(["", "blurry"]),
        "steps": chance.randint(1, 12),
        "cfg_scale": chance.choice([1.0, 3.0, 7.5]),
        "sampler_name": chance.choice(SAMPLERS),
        "width": chance.choice([64, 64, 64, 128]),
        "height": 64,
        "seed": chance.randint(-1, 1000),
        "batch_size": chance.choice([1, 1, 2, 4]),
    }


def good(url: str, chance: random.Random) -> int:
    path, asked = "/sdapi/v1/txt2img", body(chance)
    if chance.random() < 0.3:
        path = "/v1/images/generations"
        asked = {"prompt": "a boat", "n": 2, "size": "64x64", "steps": asked["steps"]}
    return httpx.post(url + path, json=asked, timeout=WAIT).status_code


def broken(url: str, chance: random.Random) -> int:
    wrong: list[dict[str, Any]] = [
        {"steps": 10_000},
        {"sampler_name": "nothing"},
        {"width": 63},
        {"batch_size": 0},
        {"enable_hr": True},
        {"cfg_scale": 1e38, "steps": 4, "sampler_name": "ddim"},  # not finite
    ]
    asked = body(chance) | chance.choice(wrong)
    return httpx.post(url + "/sdapi/v1/txt2img", json=asked, timeout=WAIT).status_code


def leaves(url: str, chance: random.Random) -> int:
    """A client that does not wait for its answer."""
    try:
        asked = body(chance) | {"steps": 100}
        limit = httpx.Timeout(WAIT, read=chance.uniform(0.01, 0.5))
        return httpx.post(url + "/sdapi/v1/txt2img", json=asked, timeout=limit).status_code
    except httpx.ReadTimeout:
        return 0


def stops(url: str, chance: random.Random) -> int:
    """A client that interrupts its own request."""
    name = f"soak-{chance.random()}"
    where = f"{url}/sdapi/v1/interrupt?force_task_id={name}"
    timer = threading.Timer(chance.uniform(0.01, 0.4), lambda: httpx.post(where, timeout=WAIT))
    timer.start()
    asked = body(chance) | {"steps": 60, "force_task_id": name}
    answer = httpx.post(url + "/sdapi/v1/txt2img", json=asked, timeout=WAIT)
    progress = f"{url}/sdapi/v1/progress?force_task_id={name}"
    httpx.get(progress, timeout=WAIT).raise_for_status()
    timer.join()
    return answer.status_code


def slow(url: str, chance: random.Random) -> int:
    """A client that sends its body a byte at a time, and goes or is told to."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=WAIT) as line:
        head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: {where.netloc}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        line.sendall(head.encode())
        for _ in range(chance.randint(1, 30)):
            try:
                line.sendall(b" ")
            except OSError:
                return 408
            time.sleep(0.05)
    return 0


KINDS: dict[Callable[[str, random.Random], int], int] = {
    good: 10, broken: 4, leaves: 3, stops: 3, slow: 1
}  # fmt: skip
EXPECTED = {0, 200, 408, 422, 500, 503}  # 500: an output that is not finite


def memory() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def soak(seconds: float, clients: int, seed: int, out: TextIO, every: float = 10.0) -> None:
    """Run it.

    Raises:
        AssertionError: it found something wrong.
    """
    pipe = df.StableDiffusion.from_pretrained("tiny")
    limits = Limits(queue=12, batch=4, receive=1.0)
    service = Service.of(pipe, name="tiny", slots=4, limits=limits)
    seen: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    sizes: list[tuple[float, int]] = []

    with serving(service) as url:
        begun = time.monotonic()

        def client(number: int) -> None:
            chance = random.Random(seed + number)
            kind = list(KINDS)[number % len(KINDS)]  # first one of each
            while time.monotonic() < begun + seconds:
                try:
                    status = kind(url, chance)
                except Exception as error:
                    failures.append(f"{kind.__name__}: {error!r}")
                    return
                seen[f"{kind.__name__} {status}"] += 1
                if status not in EXPECTED:
                    failures.append(f"{kind.__name__}: status {status}")
                [kind] = chance.choices(list(KINDS), list(KINDS.values()))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        batcher = service.drawer
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(every, 1.0))
            now = time.monotonic() - begun
            if not sizes or now - sizes[-1][0] >= every:
                sizes.append((now, memory()))
                line = f"{now:6.0f} s  {sizes[-1][1] >> 20} MiB  {batcher.occupied} occupied"
                print(f"{line}  {batcher.waiting} waiting  {sum(seen.values())} done", file=out)
            assert now < seconds + 2 * WAIT, "a client still waits for its answer"
        until = time.monotonic() + WAIT
        while batcher.occupied or batcher.waiting:
            assert time.monotonic() < until, "a slot or a place in the queue was not freed"
            time.sleep(0.05)
        ended = batcher.statistics
        fates = ended.finished + ended.failed + ended.cancelled
        assert ended.accepted == fates, f"{ended.accepted} accepted, {fates} came to an end"
        assert batcher.alive, "the batcher died"
        assert httpx.get(url + "/healthz").status_code == 200
    for name, count in sorted(seen.items()):
        print(f"{count:7} {name}", file=out)
    print(ended, file=out)
    assert not failures, failures[:5]
    late = [size for at, size in sizes if at >= seconds / 3]
    if seconds >= SETTLED and len(late) > 1:
        grown = max(late) - late[0]
        print(f"memory grew by {grown / 2**20:.1f} MiB after the first third", file=out)
        assert grown <= GROWTH, f"memory grew by {grown >> 20} MiB"
    print("nothing wrong", file=out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where to write; default the screen")
    options = parser.parse_args()
    if options.log is None:
        soak(options.seconds, options.clients, options.seed, sys.stdout)
        return
    with options.log.open("w", buffering=1) as out:
        soak(options.seconds, options.clients, options.seed, out)


if __name__ == "__main__":
    main()
