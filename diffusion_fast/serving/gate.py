"""What every HTTP request passes: host, origin, token, rate, size of the body; its id and log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits, Refused
from .metrics import Metrics

LOG = logging.getLogger("diffusion_fast.serve")
LOCAL = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/", "/healthz", "/readyz")  # without a token; and what the page and files are made of
OPEN_FOLDERS = ("/static/", "/files/")
CLIENTS = 4096  # whose rate is remembered
_ID = re.compile(r"[\w.-]{1,64}\Z")


class Rate:
    """Requests a minute for each client: a bucket that fills up steadily."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Seconds until the client may ask again; 0 if it may now, which is counted."""
        if not self.limit:
            return 0.0
        now, each = time.monotonic(), 60 / self.limit
        room, last = self._buckets.pop(client, (float(self.limit), now))
        room = min(self.limit, room + (now - last) / each)
        allowed = room >= 1
        self._buckets[client] = room - allowed, now
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - room) * each


class Gate:
    """ASGI middleware around the whole server.

    Args:
        app: what is behind it.
        limits: size of bodies, rate, time to send a body.
        metrics: counts requests.
        token: what clients must show, as Bearer or as Basic password; None for no token.
        hosts: names that the server answers to, without a port.
        origins: origins of pages elsewhere that may call it; ``"*"`` for all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        hosts: Sequence[str],
        origins: Sequence[str],
    ) -> None:
        self.app, self.limits, self.metrics, self.token = app, limits, metrics, token
        self.hosts, self.origins = [*LOCAL, *hosts], list(origins)
        self.rate = Rate(limits.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request = _Request(scope, headers, asked if _ID.match(asked) else secrets.token_hex(8))
        scope.setdefault("state", {}).update(request_id=request.id, caller=request.caller)
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request.id
                out["x-content-type-options"] = "nosniff"
                if origin is not None and self._shares(origin):
                    out["access-control-allow-origin"] = origin
                    out["access-control-allow-headers"] = "authorization, content-type"
                    out["access-control-allow-methods"] = "GET, POST"
                    out.add_vary_header("origin")
            await send(message)

        try:
            self._check(request, origin)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _answer(answer, 204 if self._shares(origin) else 403, b"")
            else:
                await self.app(scope, self._bounded(request, receive), answer)
        except Refused as error:
            if request.status is not None:
                raise
            await refuse(scope, answer, error)
        except Exception:
            LOG.exception("request failed", extra={"facts": {"request_id": request.id}})
            if request.status is None:
                await refuse(scope, answer, Refused(500, "internal error"))
        finally:
            self._log(request)

    def _check(self, request: _Request, origin: str | None) -> None:
        host = re.sub(r":\d+\Z", "", request.headers.get("host", "")).lower()
        if host not in self.hosts and "*" not in self.hosts:
            raise Refused(421, f"Host: expected one of {', '.join(self.hosts)}, got {host!r:.80}")
        if origin is not None and not self._shares(origin):
            own = re.sub(r"\Ahttps?://", "", origin.lower())
            if own != request.headers.get("host", "").lower():
                raise Refused(403, f"Origin: expected the server's own page, got {origin!r:.80}")
        if request.scope["method"] == "OPTIONS":
            return
        path = request.scope["path"]
        free = path in OPEN or path.startswith(OPEN_FOLDERS)
        if self.token is not None and not free and not self._knows(request):
            raise Refused(401, "expected the token, as Bearer or as the password of Basic")
        if request.scope["method"] == "POST" and path.endswith(("2img", "generations", "edits")):
            wait = self.rate.wait(request.client)
            if wait:
                seconds = str(int(wait) + 1)
                raise Refused(
                    429,
                    f"expected at most {self.limits.rate} requests a minute, got"
                    f" more; try again in {seconds} s",
                )
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body:
            raise Refused(413, f"expected a body of at most {self.limits.body} bytes, got {length}")

    def _shares(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def _knows(self, request: _Request) -> bool:
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            value = request.basic[1]
        assert self.token is not None
        given = value.encode() if kind.lower() in ("bearer", "basic") else b""
        return secrets.compare_digest(given, self.token.encode())

    def _bounded(self, request: _Request, receive: Receive) -> Receive:
        """``receive`` that counts and times the body."""
        until = time.monotonic() + self.limits.receive
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                seconds = f"{self.limits.receive:g} seconds"
                raise Refused(
                    408, f"expected the body within {seconds}, got {size} bytes"
                ) from None
            size += len(message.get("body", b""))
            if size > self.limits.body:
                raise Refused(413, f"expected a body of at most {self.limits.body} bytes, got more")
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded

    def _log(self, request: _Request) -> None:
        route = getattr(request.scope.get("route"), "path", "other")
        seconds = time.monotonic() - request.begun
        status = request.status or 500
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        facts = {
            "request_id": request.id,
            "client": request.client,
            "method": request.scope["method"],
            "path": request.scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        LOG.info("request", extra={"facts": facts})


class _Request:
    """A request on its way through the gate."""

    def __init__(self, scope: Scope, headers: Headers, id: str) -> None:
        self.scope, self.headers, self.id = scope, headers, id
        self.status: int | None = None
        self.begun = time.monotonic()
        self.client = (scope.get("client") or ("unknown", 0))[0]

    @property
    def basic(self) -> tuple[str, str]:
        """User and password of Basic authorization."""
        kind, _, value = self.headers.get("authorization", "").partition(" ")
        if kind.lower() != "basic":
            return "", ""
        try:
            user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return "", ""
        return user, password

    @property
    def caller(self) -> str:
        """Whose requests are one's own: those of an address and a user's name."""
        return f"{self.client} {self.basic[0]}"


async def refuse(scope: Scope, send: Any, error: Refused) -> None:
    """Answer with an error in the form of the API that was asked."""
    body = error_body(scope["path"], error.status, error.message, None)
    extra = []
    if error.status == 401:
        extra = [(b"www-authenticate", b'Basic realm="diffusion-fast", charset="UTF-8"')]
    if error.status in (429, 503):
        extra = [(b"retry-after", b"1")]
    await _answer(send, error.status, json.dumps(body).encode(), extra)


def error_body(path: str, status: int, message: str, field: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients, or as FastAPI's, read it."""
    if path.startswith("/v1/"):
        kinds = {401: "authentication_error", 429: "rate_limit_error", 413: "invalid_request_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        text = message if field is None else f"{field}: {message}"
        return {"error": {"message": text, "type": kind, "param": field, "code": None}}
    if field is None:
        return {"detail": message}
    return {"detail": [{"loc": ["body", field], "msg": message, "type": "value_error"}]}


async def _answer(
    send: Any, status: int, body: bytes, extra: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    headers = [(b"content-type", b"application/json"), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def log_as_json() -> None:
    """Write a line of JSON on standard error for each request, from level ``LOG_LEVEL`` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for logger in ("diffusion_fast", "uvicorn"):
        logging.getLogger(logger).handlers = [handler]
        logging.getLogger(logger).setLevel(os.environ.get("LOG_LEVEL", "INFO").upper())


class JSONLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
