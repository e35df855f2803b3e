"""The server: both APIs, health, metrics and the page, behind the gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from .._version import __version__
from . import automatic1111, openai
from .gate import LOG, Gate, error_body
from .limits import FieldError, Refused
from .service import Service

PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"


def create_app(
    service: Service,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> Gate:
    """The ASGI application of a service; it warms the model up when it starts, and closes it.

    Args:
        service: the model.
        token: what clients must show; None for no token.
        hosts: names beside localhost that the server answers to; ``"*"`` for all.
        origins: origins of other pages that may call it; none by default.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(asyncio.to_thread(service.warm_up))
        warming.add_done_callback(_report)
        yield
        service.ready = False
        await asyncio.to_thread(service.drawer.close, 0)

    app = FastAPI(title="diffusion-fast", version=__version__, lifespan=lifespan)
    app.include_router(openai.router(service))
    app.include_router(automatic1111.router(service))
    _add_routes(app, service)
    _add_errors(app)
    gate = {"limits": service.limits, "metrics": service.metrics}
    return Gate(app, token=token, hosts=hosts, origins=origins, **gate)  # type: ignore[arg-type]


def _report(warming: asyncio.Task[None]) -> None:
    error = None if warming.cancelled() else warming.exception()
    if error is not None:
        LOG.error("the warm-up failed: %r", error, extra={"facts": {}})
    else:
        LOG.info("ready", extra={"facts": {}})


def _add_routes(app: FastAPI, service: Service) -> None:
    app.mount("/static", StaticFiles(directory=PAGE))

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": _POLICY})

    @app.get("/healthz")
    def healthz() -> Response:
        """Whether the thread that draws is alive."""
        alive = service.drawer.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/readyz")
    def readyz() -> Response:
        """Whether images can be asked for: after the warm-up."""
        ready = service.ready and service.drawer.alive
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/queue")
    def queue() -> dict[str, Any]:
        """What the page shows of everybody's requests: numbers only."""
        drawer, model = service.drawer, service.model
        return {
            "model": model.name,
            "slots": drawer.slots,
            "occupied": drawer.occupied,
            "waiting": drawer.waiting,
            "width": model.width,
            "height": model.height,
            "steps": model.steps,
            "guidance": model.guidance,
            "sampler": model.sampler,
        }

    @app.get("/files/{name}", include_in_schema=False)
    def file(name: str) -> Response:
        found = service.files.get(name)
        if found is None:
            raise Refused(404, "expected the name of a file that is kept, got none")
        return Response(found.data, media_type=found.type)


def _add_errors(app: FastAPI) -> None:
    """Every error in the form of the API that was asked, with the field's name."""

    def answer(request: Request, status: int, message: str, field: str | None = None) -> Response:
        return JSONResponse(error_body(request.url.path, status, message, field), status)

    @app.exception_handler(FieldError)
    def wrong_field(request: Request, error: FieldError) -> Response:
        return answer(request, 422, error.message, error.field)

    @app.exception_handler(RequestValidationError)
    def not_valid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        return answer(request, 422, str(first["msg"]), ".".join(where) or "body")

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> Response:
        response = answer(request, error.status, error.message)
        if error.status == 503:
            response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(FloatingPointError)
    def not_finite(request: Request, error: FloatingPointError) -> Response:
        return answer(request, 500, str(error))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    def other(request: Request, error: Exception) -> Response:
        return answer(request, 500, "internal error")
