"""Health, metrics, logs, limits, who may ask, and how a server ends."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest
from PIL import Image
from tiny_server import LIMITS, Served

from diffusion_fast.serving import Limits, create_app
from diffusion_fast.serving.gate import JSONLines, Rate
from diffusion_fast.serving.limits import FieldError
from diffusion_fast.serving.pictures import Files, encoded, from_bytes

SMALL = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64}
LONG = {**SMALL, "steps": 400}


def test_health_and_metrics(served: Served) -> None:
    for path in ("/healthz", "/readyz"):
        assert httpx.get(served.url + path).status_code == 200
    served.post("/sdapi/v1/txt2img", **SMALL).raise_for_status()
    text = httpx.get(served.url + "/metrics").text
    for name in ("steps_total", "slots_occupied", "queue_length", "image_seconds_bucket"):
        assert f"diffusion_fast_{name}" in text
    assert 'diffusion_fast_images_total{fate="finished"}' in text
    assert 'route="/sdapi/v1/txt2img",status="200"' in text
    now = httpx.get(served.url + "/queue").json()
    assert now["model"] == "tiny"
    assert now["slots"] == 4


def test_not_ready_before_the_warm_up(served: Served) -> None:
    served.service.ready = False
    try:
        assert httpx.get(served.url + "/readyz").status_code == 503
        assert httpx.get(served.url + "/healthz").status_code == 200
    finally:
        served.service.ready = True


def test_request_ids_and_logs(served: Served) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JSONLines().format(record))

    log, handler = logging.getLogger("diffusion_fast.serve"), Keep()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        answer = httpx.get(served.url + "/healthz", headers={"x-request-id": "my-own"})
        assert answer.headers["x-request-id"] == "my-own"
        answer = httpx.get(served.url + "/healthz", headers={"x-request-id": "bad id"})
        assert len(answer.headers["x-request-id"]) == 16
    finally:
        log.removeHandler(handler)
    first = json.loads(lines[0])
    assert (first["request_id"], first["path"], first["status"]) == ("my-own", "/healthz", 200)


def wait_for(true: Any) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_client_that_goes_cancels(served: Served) -> None:
    batcher = served.service.drawer
    before = batcher.statistics.cancelled
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + "/sdapi/v1/txt2img", json=LONG, timeout=0.3)
    wait_for(lambda: batcher.statistics.cancelled == before + 1 and not batcher.occupied)


def test_a_full_queue_and_a_long_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.service.drawer, "queue", 1)
    answer = served.post("/sdapi/v1/txt2img", **SMALL, batch_size=4)
    assert answer.status_code == 503
    assert "queue: expected room for 4 requests" in answer.json()["detail"]
    assert answer.headers["retry-after"] == "1"
    monkeypatch.setattr(served.service, "limits", Limits(timeout=0.05))
    answer = served.post("/v1/images/generations", prompt="a cat", size="64x64", steps=100)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "server_error"
    wait_for(lambda: not served.service.drawer.occupied)


def test_an_output_that_is_not_finite_is_an_answer(served: Served) -> None:
    answer = served.post("/sdapi/v1/txt2img", **{**SMALL, "steps": 4, "cfg_scale": 1e38})
    assert answer.status_code == 500
    assert "expected finite outputs" in answer.json()["detail"]
    assert served.post("/sdapi/v1/txt2img", **SMALL).status_code == 200


def client(served: Served, limits: Limits = LIMITS, **options: Any) -> httpx.AsyncClient:
    """In this process, of another server over the same model."""
    app = create_app(served.service, **options)
    app.limits, app.rate = limits, Rate(limits.rate)
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")


def get(served: Served, path: str, options: dict[str, Any], **request: Any) -> httpx.Response:
    import asyncio

    async def ask() -> httpx.Response:
        async with client(served, **options) as one:
            return await one.request(request.pop("method", "GET"), path, **request)

    return asyncio.run(ask())


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"ann:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer sécret", 401),
        ("Basic %%%", 401),
        (basic("wrong"), 401),
        (basic("secret"), 200),
        ("Bearer secret", 200),
    ],
)
def test_the_token(served: Served, header: str | None, status: int) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/sdapi/v1/options", "/metrics", "/docs", "/queue"):
        answer = get(served, path, {"token": "secret"}, headers=headers)
        assert answer.status_code == status
        assert ("www-authenticate" in answer.headers) == (status == 401)
    for path in ("/healthz", "/readyz", "/", "/static/app.js"):
        assert get(served, path, {"token": "secret"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "options", "status"),
    [
        ({"host": "evil.example"}, {}, 421),
        ({"host": "evil.example"}, {"hosts": ["evil.example"]}, 200),
        ({"host": "anything:1"}, {"hosts": ["*"]}, 200),
        ({"host": "[::1]:8000"}, {}, 200),
        ({"origin": "http://evil.example"}, {}, 403),
        ({"origin": "null"}, {}, 403),
        ({"origin": "http://localhost:8000"}, {}, 200),
        ({"origin": "http://friend.example"}, {"origins": ["http://friend.example"]}, 200),
    ],
)
def test_hosts_and_origins(
    served: Served, headers: dict[str, str], options: dict[str, Any], status: int
) -> None:
    answer = get(served, "/v1/models", options, headers=headers)
    assert answer.status_code == status
    shared = answer.headers.get("access-control-allow-origin")
    assert shared == (headers.get("origin") if "origins" in options else None)
    if "origin" in headers:
        answer = get(served, "/v1/models", options, headers=headers, method="OPTIONS")
        assert answer.status_code == {200: 204, 403: 403}[status] or "origins" not in options


def test_sizes_of_bodies(served: Served) -> None:
    limits = {"limits": Limits(body=100)}
    url = "/sdapi/v1/txt2img"
    large: dict[str, Any] = {"method": "POST", "json": {"prompt": "x" * 200}}
    assert get(served, url, limits, **large).status_code == 413

    async def pieces() -> Any:
        for _ in range(30):
            yield b"x" * 10

    answer = get(served, url, limits, method="POST", content=pieces())
    assert answer.status_code == 413
    answer = get(
        served, "/v1/images/generations", limits, method="POST", json={"prompt": "x" * 200}
    )
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_slow_body(served: Served) -> None:
    import asyncio

    async def pieces() -> Any:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    options = {"limits": Limits(receive=0.1)}
    answer = get(served, "/sdapi/v1/txt2img", options, method="POST", content=pieces())
    assert answer.status_code == 408


def test_the_rate(served: Served) -> None:
    import asyncio

    async def ask() -> list[int]:
        async with client(served, Limits(rate=2)) as one:
            url, body = "/sdapi/v1/txt2img", {"steps": 0}
            answers = [await one.post(url, json=body) for _ in range(4)]
            assert "expected at most 2 requests a minute" in answers[-1].json()["detail"]
            assert (await one.get("/v1/models")).status_code == 200
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [422, 422, 429, 429]
    rate = Rate(60)
    assert rate.wait("a") == 0
    for number in range(5000):
        rate.wait(str(number))
    assert len(rate._buckets) <= 4096


def test_files_are_bounded_and_expire() -> None:
    files = Files(Limits(files=2, file_bytes=100, file_seconds=0.2))
    first, second = files.add(b"x" * 40, "image/png"), files.add(b"y" * 40, "image/png")
    found = files.get(first)
    assert found is not None
    assert found.data == b"x" * 40
    third = files.add(b"z" * 70, "image/png")
    assert files.get(first) is None
    assert files.get(second) is None
    assert files.get(third) is not None
    time.sleep(0.25)
    assert files.get(third) is None
    assert len(files) == 0


def test_uploaded_pictures() -> None:
    def file(image: Image.Image, kind: str = "PNG") -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind)
        return stream.getvalue()

    assert from_bytes("image", file(Image.new("P", (8, 9))), LIMITS).mode == "RGB"
    assert from_bytes("image", file(Image.new("LA", (8, 9))), LIMITS).mode == "RGBA"
    large = file(Image.new("1", (5000, 5000)))
    for data in (
        large,
        b"",
        file(Image.new("L", (8, 8)), "BMP"),
        file(Image.effect_noise((99, 99), 50))[:900],
    ):
        with pytest.raises(FieldError, match="image: expected a picture"):
            from_bytes("image", data, LIMITS)
    picture = Image.new("RGB", (8, 8))
    picture.info["parameters"] = "a cat, Größe"
    assert Image.open(io.BytesIO(encoded(picture))).info["parameters"] == "a cat, Größe"
    exif = Image.open(io.BytesIO(encoded(picture, "jpeg"))).getexif().get_ifd(0x8769)
    assert exif[0x9286] == b"UNICODE\0" + "a cat, Größe".encode("utf-16-be")


@pytest.mark.parametrize("name", ["steps", "side", "timeout"])
def test_bad_limits(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0, got 0"):
        Limits(**{name: 0})


@pytest.mark.slow
def test_sigterm_finishes_what_runs() -> None:
    """The command line's server: a request that runs is answered, and the process ends well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusion_fast", "serve", "--model", "tiny", "--port"]
    process = subprocess.Popen(
        [*command, str(port)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        url, answers = f"http://127.0.0.1:{port}", []

        def ready() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(url + "/readyz").status_code == 200
            except httpx.TransportError:
                return False

        until = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < until
            time.sleep(0.1)

        def draw() -> None:
            body = {**SMALL, "steps": 100}
            answers.append(httpx.post(url + "/sdapi/v1/txt2img", json=body, timeout=120))

        thread = threading.Thread(target=draw)
        thread.start()
        while not httpx.get(url + "/queue").json()["occupied"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join(120)
        assert answers[0].status_code == 200
        assert len(answers[0].json()["images"]) == 1
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM)
        lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
        assert any(line.get("path") == "/sdapi/v1/txt2img" for line in lines)
    finally:
        process.kill()
        process.wait()
