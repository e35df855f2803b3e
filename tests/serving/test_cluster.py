"""Two replicas of a tiny model on a Ray of this machine: what one process promises holds."""

from __future__ import annotations

import base64
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'diffusion-fast[ray]'")

from ray import serve  # noqa: E402

from diffusion_fast import StableDiffusion  # noqa: E402
from diffusion_fast.serving.cluster import NAME, application  # noqa: E402
from diffusion_fast.serving.settings import Settings  # noqa: E402

pytestmark = pytest.mark.slow
SETTINGS = {"model": "tiny", "slots": 4, "queue": 16, "max_steps": 400, "max_side": 256}
SMALL = {"prompt": "a cat", "steps": 4, "cfg_scale": 4.0, "width": 64, "height": 64}
LONG = {**SMALL, "steps": 150, "sampler_name": "Euler a"}
TIMEOUT = 120


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(Settings(**SETTINGS, replicas=2)), name=NAME)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion.from_pretrained("tiny")


def wait_for(true: Callable[[], Any]) -> None:
    until = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def metric(url: str, name: str) -> float:
    """A number of the server's, summed over its replicas."""
    text = httpx.get(url + "/metrics", timeout=TIMEOUT).text
    found = re.search(rf"^diffusion_fast_{re.escape(name)} (\S+)$", text, re.M)
    assert found is not None, text
    return float(found[1])


def post(url: str, body: dict[str, Any], timeout: float = TIMEOUT) -> httpx.Response:
    return httpx.post(url + "/sdapi/v1/txt2img", json=body, timeout=timeout)


def same(text: str, expected: Image.Image) -> None:
    one = Image.open(io.BytesIO(base64.b64decode(text)))
    assert np.abs(np.int16(one) - np.int16(expected)).max() <= 1


def alone(pipe: StableDiffusion, body: dict[str, Any]) -> Image.Image:
    how = {"steps": body["steps"], "guidance_scale": body["cfg_scale"], "size": 64}
    sampler = body.get("sampler_name")
    return pipe(body["prompt"], seed=body["seed"], sampler=sampler, **how).images[0]


def replicas() -> list[str]:
    """Names of the model's replicas."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in names if f"{NAME}#model#" in one["name"]]


def test_both_clients_at_once(url: str, pipe: StableDiffusion) -> None:
    where = urlsplit(url)
    web = webuiapi.WebUIApi(host=where.hostname, port=where.port, sampler="Euler a")
    open_ai = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

    def ours(seed: int) -> tuple[Image.Image, Image.Image]:
        settings = {k: v for k, v in SMALL.items() if k != "prompt"}
        made = web.txt2img(prompt="a dog", seed=seed, **settings)
        truth = pipe("a dog", seed=seed, steps=4, guidance_scale=4.0, size=64, sampler="Euler a")
        return made.image, truth.images[0]

    def theirs(seed: int) -> tuple[Image.Image, Image.Image]:
        extra = {"steps": 5, "seed": seed, "sampler": "heun"}
        made = open_ai.images.generate(
            prompt="a boat",
            size="64x64",  # type: ignore[arg-type]
            response_format="b64_json",
            extra_body=extra,
        )
        assert made.data is not None
        truth = pipe("a boat", size=64, **extra)
        file = io.BytesIO(base64.b64decode(made.data[0].b64_json or ""))
        return Image.open(file), truth.images[0]

    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit((ours, theirs)[i % 2], i) for i in range(16)]
        for one in made:
            drawn, truth = one.result(TIMEOUT)
            assert np.abs(np.int16(drawn) - np.int16(truth)).max() <= 1
    assert metric(url, 'images_total{fate="finished"}') == 16 + 3  # warm-ups of each, and of all
    assert metric(url, "slots") == 8
    for path in ("/healthz", "/readyz", "/"):
        assert httpx.get(url + path, timeout=TIMEOUT).status_code == 200


def test_ids_find_their_replica(url: str) -> None:
    answers: dict[str, Any] = {}

    def draw(name: str) -> None:
        body = {**LONG, "steps": 400, "force_task_id": name}
        answers[name] = post(url, body).json()

    names = [f"task-{i}" for i in range(4)]
    threads = [threading.Thread(target=draw, args=(name,)) for name in names]
    for thread in threads:
        thread.start()

    def progress(name: str) -> Any:
        where = f"{url}/sdapi/v1/progress?force_task_id={name}"
        return httpx.get(where, timeout=TIMEOUT).json()

    for name in names:
        wait_for(lambda name=name: progress(name)["current_image"] is not None)
        assert 0 < progress(name)["progress"] < 1
        assert progress(name)["state"]["sampling_steps"] == 400
    for name in names:
        httpx.post(f"{url}/sdapi/v1/interrupt?force_task_id={name}", timeout=TIMEOUT)
    for thread in threads:
        thread.join(TIMEOUT)
    assert all(answers[name]["images"] == [] for name in names)
    wait_for(lambda: metric(url, "slots_occupied") == 0)
    assert metric(url, 'images_total{fate="cancelled"}') == 4


def test_limits_and_errors(url: str) -> None:
    answer = post(url, {**SMALL, "width": 512})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "width, height"]
    answer = post(url, {**SMALL, "steps": 500})
    assert answer.json()["detail"][0]["loc"] == ["body", "steps"]
    assert post(url, {**SMALL, "cfg_scale": 1e38}).status_code == 500
    answer = httpx.get(url + "/v1/models", headers={"host": "evil.example"}, timeout=TIMEOUT)
    assert answer.status_code == 421


def test_a_client_that_goes_cancels(url: str) -> None:
    before = metric(url, 'images_total{fate="cancelled"}')
    with pytest.raises(httpx.ReadTimeout):
        post(url, {**LONG, "steps": 400}, timeout=0.5)
    wait_for(lambda: metric(url, 'images_total{fate="cancelled"}') == before + 1)
    wait_for(lambda: metric(url, "slots_occupied") == 0)


def test_a_replica_that_is_killed_under_load(url: str, pipe: StableDiffusion) -> None:
    """Every request has one answer, which is the picture that is drawn alone."""
    bodies = [{**LONG, "seed": seed} for seed in range(10)]
    with ThreadPoolExecutor(10) as pool:
        made = [pool.submit(post, url, body) for body in bodies]
        wait_for(lambda: metric(url, "slots_occupied") > 5)
        killed, *_ = replicas()
        ray.kill(ray.get_actor(killed, namespace="serve"), no_restart=True)
        for one, body in zip(made, bodies, strict=True):
            answer = one.result(TIMEOUT)
            assert answer.status_code == 200, answer.text
            [picture] = answer.json()["images"]
            same(picture, alone(pipe, body))
    wait_for(lambda: metric(url, "slots") == 8)  # another one took its place
    assert killed not in replicas()


def test_up_and_down_under_load(url: str) -> None:
    stop = threading.Event()
    codes: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            codes.append(post(url, {**LONG, "steps": 30}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for count in (3, 1):
            serve.run(application(Settings(**SETTINGS, replicas=count)), name=NAME)
            wait_for(lambda count=count: metric(url, "slots") == 4 * count)
            enough = len(codes) + 8
            wait_for(lambda enough=enough: len(codes) >= enough)
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
    assert set(codes) == {200}, codes
