"""AUTOMATIC1111's API, ``/sdapi/v1``, as far as one model that is fixed can honor it.

Fields without effect are ignored. Those that ask for what there is not are refused by name.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from PIL import ImageChops
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool

from ..samplers import SAMPLERS
from ..samplers.names import A1111_SCHEDULES
from .inpainting import Masked, masked
from .limits import FieldError
from .pictures import encoded, from_base64
from .service import Drawn, Service, Task

FIELDS = {
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "timestep_spacing": "scheduler",
    "strength": "denoising_strength",
    "image": "init_images",
    "size": "width, height",
    "clip_skip": "override_settings",
}


def only(*allowed: Any) -> AfterValidator:
    """Of a field whose only accepted values are those that ask for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            words = " or ".join(json.dumps(one) for one in allowed)
            raise ValueError(f"expected {words} (it is not available here), got {value!r:.60}")
        return value

    return AfterValidator(check)


Off = Annotated[Any, only(False)]
Nothing = Annotated[Any, only(0)]
Empty = Annotated[Any, only("", [], {})]
Pixels = Annotated[int, Field(ge=0, le=1024)]


class Drawing(BaseModel):
    """What text to image and image to image have in common."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int = -1
    sampler_name: str | None = None
    sampler_index: str | None = None  # its old name
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    override_settings: dict[str, Any] | None = None
    force_task_id: Annotated[str, Field(max_length=64)] | None = None
    send_images: StrictBool = True

    styles: Empty = None
    subseed: Any = -1  # of no effect without a strength
    subseed_strength: Nothing = 0
    seed_resize_from_h: Annotated[Any, only(0, -1)] = -1
    seed_resize_from_w: Annotated[Any, only(0, -1)] = -1
    restore_faces: Off = None
    tiling: Off = None
    s_churn: Nothing = None
    s_tmin: Any = None  # of no effect without churn
    s_tmax: Any = None
    s_noise: Annotated[Any, only(1)] = None
    s_min_uncond: Nothing = None
    refiner_checkpoint: Empty = None
    refiner_switch_at: Any = None
    script_name: Empty = None
    script_args: Any = None
    alwayson_scripts: Any = None
    infotext: Empty = None
    do_not_save_samples: Any = None  # nothing is saved
    do_not_save_grid: Any = None
    save_images: Off = False
    override_settings_restore_afterwards: Any = None  # nothing is left changed
    disable_extra_networks: Off = None
    comments: Any = None


class TextToImage(Drawing):
    """The body of ``/sdapi/v1/txt2img``."""

    enable_hr: Off = False
    denoising_strength: Any = None  # of no effect without the second pass
    firstphase_width: Nothing = 0
    firstphase_height: Nothing = 0
    firstpass_image: Empty = None
    hr_scale: Any = None
    hr_upscaler: Any = None
    hr_second_pass_steps: Any = None
    hr_resize_x: Any = None
    hr_resize_y: Any = None
    hr_checkpoint_name: Any = None
    hr_sampler_name: Any = None
    hr_scheduler: Any = None
    hr_prompt: Any = None
    hr_negative_prompt: Any = None
    hr_additional_modules: Any = None


class ImageToImage(Drawing):
    """The body of ``/sdapi/v1/img2img``."""

    init_images: list[str]
    mask: str | None = None
    denoising_strength: float | None = 0.75
    resize_mode: Nothing = 0
    mask_blur: Pixels | None = None  # both of the next two
    mask_blur_x: Pixels = 4
    mask_blur_y: Pixels = 4
    mask_round: Any = None  # the sampler's masks are of zeros and ones here
    inpainting_fill: Literal[0, 1] = 0  # colors from around, or the picture's own
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Pixels | None = 0
    inpainting_mask_invert: bool = False
    latent_mask: Empty = None
    initial_noise_multiplier: Annotated[Any, only(1)] = None
    image_cfg_scale: Any = None  # of models that edit by instruction
    include_init_images: Off = False


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/sdapi/v1")

    @routes.post("/txt2img")
    async def txt2img(body: TextToImage, request: Request) -> dict[str, Any]:
        return await _draw(service, request, body, {})

    @routes.post("/img2img")
    async def img2img(body: ImageToImage, request: Request) -> dict[str, Any]:
        given, part = await asyncio.to_thread(_pictures, service, body)
        return await _draw(service, request, body, given, part)

    @routes.get("/progress")
    async def progress(
        request: Request, skip_current_image: bool = False, force_task_id: str | None = None
    ) -> dict[str, Any]:
        tasks = service.tasks_of(request.state.caller, force_task_id)
        return await asyncio.to_thread(_progress, tasks, not skip_current_image)

    @routes.post("/interrupt")
    async def interrupt(request: Request, force_task_id: str | None = None) -> dict[str, Any]:
        for task in service.tasks_of(request.state.caller, force_task_id):
            task.cancel()
        return {}

    @routes.get("/options")
    def options() -> dict[str, Any]:
        return _options(service)

    @routes.post("/options")
    def set_options(body: dict[str, Any]) -> None:
        now = _options(service)
        for name, value in body.items():
            if name == "sd_model_checkpoint":
                service.check_model(name, value)
            elif value != now.get(name):
                expected = f"{now[name]!r}, as it is" if name in now else "no such option"
                raise FieldError(name, f"expected {expected}, got {value!r:.60}")

    @routes.get("/sd-models")
    def models() -> list[dict[str, Any]]:
        name = service.name
        nothing = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name, **nothing}]

    @routes.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [
            {"name": one.a1111 or name, "aliases": [name], "options": {}}
            for name, one in SAMPLERS.items()
        ]

    @routes.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        automatic = {"name": "automatic", "label": "Automatic"}
        known = [{"name": name, "label": label} for label, name in A1111_SCHEDULES.items()]
        more = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{**one, **more} for one in (automatic, *known)]

    @routes.get("/loras")
    def loras() -> list[dict[str, Any]]:
        return [
            {"name": name, "alias": name, "path": name, "metadata": {"scale": scale}}
            for name, scale in service.loras.items()
        ]

    return routes


def _options(service: Service) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": service.name,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
    }


async def _draw(
    service: Service,
    request: Request,
    body: Drawing,
    pictures: dict[str, Any],
    part: Masked | None = None,
) -> dict[str, Any]:
    for field in ("batch_size", "n_iter"):
        service.check_count(field, getattr(body, field))
    count = body.batch_size * body.n_iter
    service.check_count("batch_size, n_iter", count)
    for field in ("prompt", "negative_prompt"):
        service.check_prompt(field, getattr(body, field) or "")
    for name, script in (body.alwayson_scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if arguments not in (None, [], {}, [False]):  # how clients switch one off
            raise FieldError("alwayson_scripts", f"expected none that is on, got {name!r:.60}")
    sampler = _sampler(body)
    asked: dict[str, Any] = {
        "prompt": service.without_loras("prompt", body.prompt),
        "negative_prompt": body.negative_prompt or None,
        "steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "clip_skip": _clip_skip(service, body.override_settings or {}),
        "size": _size(service, body),
        **sampler,
        **pictures,
    }
    seed = secrets.randbelow(2**32) if body.seed == -1 else body.seed
    drawn = await service.draw(
        [{**asked, "seed": seed + i} for i in range(count)],
        caller=request.state.caller,
        gone=request.is_disconnected,
        fields=FIELDS,
        task_id=body.force_task_id,
    )
    if part is not None:
        whole = await asyncio.to_thread(lambda: [part.finished(one.image) for one in drawn])
        drawn = [replace(one, image=image) for one, image in zip(drawn, whole, strict=True)]
    images = []
    if body.send_images:
        images = await asyncio.to_thread(lambda: [_text(one) for one in drawn])
    parameters = body.model_dump(exclude={"init_images", "mask"})
    info = _info(service, body, drawn, asked, seed)
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def _text(one: Drawn) -> str:
    return base64.b64encode(encoded(one.image)).decode()


def _info(
    service: Service, body: Drawing, drawn: list[Drawn], asked: dict[str, Any], seed: int
) -> dict[str, Any]:
    seeds = [one.seed for one in drawn]
    width, height = drawn[0].image.size if drawn else (body.width, body.height)
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(drawn),
        "negative_prompt": body.negative_prompt or "",
        "all_negative_prompts": [body.negative_prompt or ""] * len(drawn),
        "seed": seed,
        "all_seeds": seeds,
        "width": width,
        "height": height,
        "sampler_name": asked.get("sampler") or service.model.sampler,
        "cfg_scale": body.cfg_scale,
        "steps": body.steps,
        "batch_size": body.batch_size,
        "denoising_strength": asked.get("strength"),
        "sd_model_name": service.name,
        "clip_skip": asked["clip_skip"] + 1,
        "infotexts": [one.text for one in drawn],
        "index_of_first_image": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
    }


def _sampler(body: Drawing) -> dict[str, Any]:
    """Sampler and schedule: AUTOMATIC1111's names mean its grids, ours those of diffusers."""
    name = body.sampler_name or body.sampler_index
    schedule = body.scheduler
    if schedule in (None, "", "Automatic", "automatic"):
        schedule = None
    labels = {one.lower(): label for label, one in A1111_SCHEDULES.items()}
    labels |= {label.lower(): label for label in A1111_SCHEDULES}
    given: dict[str, Any] = {}
    if schedule is not None:
        if schedule.lower() not in labels:
            known = ", ".join(A1111_SCHEDULES)
            raise FieldError(
                "scheduler", f"expected Automatic or one of {known}, got {schedule!r:.60}"
            )
        if name is None:
            raise FieldError("scheduler", f"expected a sampler_name beside it, got {schedule!r}")
        own = SAMPLERS[name].a1111 if name in SAMPLERS else name
        if own is None:
            raise FieldError("scheduler", f"expected Automatic for {name}, got {schedule!r:.60}")
        given["sampler"] = f"{own} {labels[schedule.lower()]}"
    elif name is not None:
        given["sampler"] = name
    if body.eta is not None and _has_eta(given.get("sampler")):
        given["eta"] = body.eta
    return given


def _has_eta(name: str | None) -> bool:
    """Whether a sampler, by any name, has the option; the others ignore it there too."""
    if name is None:
        return False
    for one in SAMPLERS.values():
        if name == one.name or (one.a1111 and name.lower().startswith(one.a1111.lower())):
            return "eta" in one.options
    return False


def _clip_skip(service: Service, settings: dict[str, Any]) -> int:
    """The one setting that a request may override for itself."""
    skip = 1
    for name, value in settings.items():
        if name == "CLIP_stop_at_last_layers" and type(value) is int and value >= 1:
            skip = value
        elif name == "sd_model_checkpoint":
            service.check_model("override_settings.sd_model_checkpoint", value)
        elif value is not None and value != _options(service).get(name):
            raise FieldError(f"override_settings.{name}", f"expected none, got {value!r:.60}")
    return skip - 1


def _size(service: Service, body: Drawing) -> Any:
    if body.width is None and body.height is None:
        return None
    for field in ("width", "height"):
        if getattr(body, field) is None:
            raise FieldError(field, "expected a number beside the other side, got none")
    assert body.width is not None
    assert body.height is not None
    return service.check_size("width, height", body.width, body.height)


def _pictures(service: Service, body: ImageToImage) -> tuple[dict[str, Any], Masked | None]:
    """Image, mask (white is drawn anew) and strength; what the result is to be put into."""
    if len(body.init_images) != 1:
        raise FieldError("init_images", f"expected one picture, got {len(body.init_images)}")
    image = from_base64("init_images", body.init_images[0], service.limits)
    service.check_size("init_images", *image.size)
    given: dict[str, Any] = {"image": image.convert("RGB"), "strength": body.denoising_strength}
    if body.mask is None:
        return given, None
    mask = from_base64("mask", body.mask, service.limits).convert("L")
    if mask.size != image.size:
        got, expected = ("{} x {}".format(*one.size) for one in (mask, image))
        raise FieldError("mask", f"expected the size of the picture, {expected}, got {got}")
    if body.inpainting_mask_invert:
        mask = ImageChops.invert(mask)
    across, down = body.mask_blur_x, body.mask_blur_y
    part = masked(
        given["image"],
        mask,
        size=_size(service, body),
        blur=(across, down) if body.mask_blur is None else (body.mask_blur, body.mask_blur),
        fill=body.inpainting_fill == 0,
        only=body.inpaint_full_res,
        padding=body.inpaint_full_res_padding or 0,
    )
    if _size(service, body) is None:  # the model draws as many pixels as the picture has
        given["size"] = image.height, image.width
    return given | part.inputs, part


def _progress(tasks: list[Task], picture: bool) -> dict[str, Any]:
    """How far the caller's requests are, together; the image of the first that runs."""
    images = [one for task in tasks for one in task.pending]
    now = [one.progress for one in images]
    part = sum(one.part for one in now) / len(now) if now else 0.0
    running = [one for one in images if one.progress.state == "running"]
    step = running[0].progress if running else None
    shown = None
    if picture and running:
        preview = running[0].preview()
        shown = None if preview is None else base64.b64encode(encoded(preview)).decode()
    seconds = time.monotonic() - tasks[0].begun if tasks else 0.0
    return {
        "progress": part,
        "eta_relative": seconds * (1 / part - 1) if part else 0.0,
        "state": {
            "skipped": False,
            "interrupted": any(one.cancelled() for one in images),
            "stopping_generation": False,
            "job": tasks[0].id if tasks else "",
            "job_count": len(images),
            "job_no": sum(one.state == "done" for one in now),
            "job_timestamp": "0",
            "sampling_step": step.step if step else 0,
            "sampling_steps": step.steps if step else 0,
        },
        "current_image": shown,
        "textinfo": "waiting" if images and not running and part < 1 else None,
    }
