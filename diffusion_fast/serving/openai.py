"""OpenAI's images API: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from .limits import FieldError, Refused
from .pictures import TYPES, encoded, from_bytes
from .service import Drawn, Service

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})\Z")


class Generation(BaseModel):
    """The body of ``/v1/images/generations``.

    ``steps`` and what follows it are ours: the client's ``extra_body``. What asks for nothing is
    ignored; values of the API's fields that nothing here can honor are refused.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int | None = 1
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    style: None = None
    moderation: Literal["auto", "low"] | None = None  # there is none to choose
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    user: str | None = None  # of no effect

    negative_prompt: str | None = None
    steps: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    clip_skip: int = 0


class Edit(Generation):
    """The fields of ``/v1/images/edits`` beside the pictures."""

    strength: float | None = None
    input_fidelity: None = None


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @routes.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refused(404, f"model: expected {service.name!r}, got {name!r:.80}")
        return _model(service)

    @routes.post("/images/generations")
    async def generations(body: Generation, request: Request) -> dict[str, Any]:
        return await _images(service, request, body, {})

    @routes.post("/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        fields, pictures = await _form(service, request)
        body = _validated(fields)
        given = await asyncio.to_thread(_editing, service, pictures)
        return await _images(service, request, body, given)

    return routes


def _model(service: Service) -> dict[str, Any]:
    made = {"created": service.created, "owned_by": "diffusion_fast"}
    return {"id": service.name, "object": "model", **made}


async def _images(
    service: Service, request: Request, body: Generation, pictures: dict[str, Any]
) -> dict[str, Any]:
    service.check_model("model", body.model)
    count = 1 if body.n is None else body.n
    service.check_count("n", count)
    for name in ("prompt", "negative_prompt"):
        service.check_prompt(name, getattr(body, name) or "")
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    asked: dict[str, Any] = {
        "prompt": service.without_loras("prompt", body.prompt),
        "negative_prompt": body.negative_prompt,
        "steps": body.steps,
        "guidance_scale": body.guidance_scale,
        "sampler": body.sampler,
        "clip_skip": body.clip_skip,
        "size": _size(service, body.size),
        **pictures,
    }
    if isinstance(body, Edit):
        asked["strength"] = body.strength
    drawn = await service.draw(
        [{**asked, "seed": seed + i} for i in range(count)],
        caller=request.state.caller,
        gone=request.is_disconnected,
        fields={},  # they have the batcher's names
    )
    kind = body.output_format or "png"
    quality = 95 if body.output_compression is None else body.output_compression
    as_text = body.response_format == "b64_json" or (
        body.response_format is None and body.output_format is not None
    )

    def data(one: Drawn) -> dict[str, Any]:
        file = encoded(one.image, kind, quality)
        if as_text:
            return {"b64_json": base64.b64encode(file).decode(), "seed": one.seed}
        name = service.files.add(file, TYPES[kind])
        return {"url": str(request.base_url) + f"files/{name}", "seed": one.seed}

    made = await asyncio.to_thread(lambda: [data(one) for one in drawn])
    return {"created": int(time.time()), "data": made, "output_format": kind}


def _size(service: Service, size: str | None) -> Any:
    if size in (None, "auto"):
        return None
    match = _SIZE.match(size or "")
    if match is None:
        raise FieldError("size", f"expected auto or WIDTHxHEIGHT, got {size!r:.40}")
    return service.check_size("size", int(match[1]), int(match[2]))


async def _form(service: Service, request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """Texts and files of a multipart body."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise FieldError("image", "expected a multipart form with a picture, got another body")
    texts: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=2, max_fields=40, max_part_size=2**20) as form:
        for name, value in form.multi_items():
            key = "image" if name == "image[]" else name
            if key in texts or key in files:
                raise FieldError(key, "expected it once, got it twice")
            if isinstance(value, UploadFile):
                files[key] = await value.read()
            else:
                texts[key] = value
    for name in files.keys() - {"image", "mask"}:
        raise FieldError(name, "expected no such file, got one")
    if "image" not in files:
        raise FieldError("image", "expected a picture, got none")
    return texts, files


def _validated(fields: dict[str, str]) -> Edit:
    """A form's texts as numbers where they are to be."""
    try:
        return TypeAdapter(Edit).validate_strings(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise FieldError(
            str(first["loc"][0]), f"{first['msg']}, got {first['input']!r:.40}"
        ) from None


def _editing(service: Service, files: dict[str, bytes]) -> dict[str, Any]:
    """Image and mask: what is transparent is drawn anew, in the mask, or without one the image."""
    from PIL import ImageChops

    limits = service.limits
    image = from_bytes("image", files["image"], limits)
    service.check_size("image", *image.size)
    source = from_bytes("mask", files["mask"], limits) if "mask" in files else image
    given: dict[str, Any] = {"image": image.convert("RGB")}
    alpha = source.getchannel("A") if source.mode == "RGBA" else None
    if alpha is not None and alpha.getextrema()[0] == 0:
        given["mask"] = ImageChops.invert(alpha.point(lambda a: 0 if a == 0 else 255))
    elif "mask" in files:
        raise FieldError("mask", "expected a picture that is transparent somewhere, got none")
    return given
