"""``diffusion-fast serve --ray``: a Ray of its own, which ends with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from diffusion_fast.cli import main

SMALL = {"prompt": "a cat", "steps": 100, "width": 64, "height": 64}


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> list[str]:
    """What the command says instead of serving."""
    monkeypatch.setattr(sys, "argv", ["diffusion-fast", "serve", "--model", "tiny", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code
    return capsys.readouterr().err.strip().splitlines()


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("diffusion_fast.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    [line] = refused(monkeypatch, capsys, ["--ray"])
    assert "--ray needs ray, which is not installed: pip install 'diffusion-fast[ray]'" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "--replicas, --max-replicas: expected 1 and none without --ray"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "expected at least --replicas, 3"),
    ],
)
def test_options(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    [line] = refused(monkeypatch, capsys, options)
    assert message in line


@pytest.mark.slow
def test_sigterm_finishes_what_runs(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'diffusion-fast[ray]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusion_fast", "serve", "--model", "tiny", "--ray"]
    environment = {**os.environ, "RAY_TMPDIR": f"/tmp/{os.getpid()}"}  # sockets need short names
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stderr=log, env=environment)
    try:
        url, answers = f"http://127.0.0.1:{port}", list[httpx.Response]()

        def ready() -> Any:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return httpx.get(url + "/readyz", timeout=30).status_code == 200
            except httpx.TransportError:
                return False

        until = time.monotonic() + 180
        while not ready():
            assert time.monotonic() < until
            time.sleep(0.5)

        def draw() -> None:
            answers.append(httpx.post(url + "/sdapi/v1/txt2img", json=SMALL, timeout=120))

        thread = threading.Thread(target=draw)
        thread.start()
        while not httpx.get(url + "/queue", timeout=30).json()["occupied"]:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        thread.join(120)
        assert answers[0].status_code == 200
        assert len(answers[0].json()["images"]) == 1
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
