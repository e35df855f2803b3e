"""AUTOMATIC1111's API, asked by the package webuiapi."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image
from tiny_server import Served

from diffusion_fast.serving.inpainting import masked

SETTINGS = {"steps": 3, "cfg_scale": 4.0, "width": 64, "height": 64, "negative_prompt": "a dog"}
OURS = {"steps": 3, "guidance_scale": 4.0, "size": 64, "negative_prompt": "a dog"}


@pytest.fixture
def api(served: Served) -> webuiapi.WebUIApi:
    where = urlsplit(served.url)
    return webuiapi.WebUIApi(host=where.hostname, port=where.port, sampler="Euler a")


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels)


def white() -> Image.Image:
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    return Image.fromarray(mask)


def same(one: Image.Image, other: Image.Image) -> None:
    assert np.abs(np.int16(one) - np.int16(other)).max() <= 1


def test_txt2img(api: webuiapi.WebUIApi, served: Served) -> None:
    made = api.txt2img(prompt="a cat", seed=5, batch_size=2, n_iter=1, **SETTINGS)
    truth = served.pipe("a cat", seed=5, batch=2, sampler="Euler a", **OURS)
    for one, expected in zip(made.images, truth.images, strict=True):
        same(one, expected)
    assert made.info["all_seeds"] == [5, 6]
    assert made.images[1].info["parameters"] == made.info["infotexts"][1]
    assert "Steps: 3, Sampler: Euler a" in made.info["infotexts"][0]
    assert made.parameters["cfg_scale"] == 4.0


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "a [cat|dog]"])
def test_prompts_that_change(api: webuiapi.WebUIApi, served: Served, prompt: str) -> None:
    asked = SETTINGS | {"steps": 4, "negative_prompt": "[bad:worse:2]", "cfg_scale": 30.0}
    made = api.txt2img(prompt=prompt, seed=5, sampler_name="PLMS", **asked)
    same_asked = OURS | {"steps": 4, "negative_prompt": "[bad:worse:2]", "guidance_scale": 30.0}
    same_asked["sampler"] = "PLMS"
    truth = served.pipe(prompt, seed=5, **same_asked)
    same(made.images[0], truth.images[0])
    plain = served.pipe("a cat", seed=5, **same_asked)
    assert np.abs(np.int16(plain.images[0]) - np.int16(truth.images[0])).max() > 1
    assert f"{prompt}\nNegative prompt: [bad:worse:2]" in made.info["infotexts"][0]


def test_a_schedule_and_a_random_seed(api: webuiapi.WebUIApi, served: Served) -> None:
    made = api.txt2img(
        prompt="a cat",
        sampler_name="DPM++ 2M",
        scheduler="Karras",
        override_settings={"CLIP_stop_at_last_layers": 2},
        **SETTINGS,
    )
    seed = made.info["seed"]
    truth = served.pipe("a cat", seed=seed, sampler="DPM++ 2M Karras", clip_skip=1, **OURS)
    same(made.images[0], truth.images[0])


def test_img2img(api: webuiapi.WebUIApi, served: Served) -> None:
    common = {"prompt": "a cat", "seed": 5, "denoising_strength": 0.7, **SETTINGS}
    made = api.img2img(images=[picture()], **common)
    ours = {"seed": 5, "sampler": "Euler a", "strength": 0.7, "image": picture(), **OURS}
    same(made.image, served.pipe("a cat", **ours).images[0])
    inpainting = {"mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
    made = api.img2img(images=[picture()], mask_image=white(), **inpainting, **common)
    truth = served.pipe("a cat", mask=white(), **ours).images[0]
    same(made.image, Image.composite(truth, picture(), white()))
    assert "Steps: 3" in made.image.info["parameters"]


def test_the_clients_own_defaults_for_a_mask(api: webuiapi.WebUIApi, served: Served) -> None:
    """A soft edge, colors from around, and the masked part alone at the whole size."""
    common = {"prompt": "a cat", "seed": 5, "denoising_strength": 0.7, **SETTINGS}
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 24, 40))
    large = picture().resize((64, 64)), mask
    made = api.img2img(images=[large[0]], mask_image=mask, **common)
    part = masked(*large, size=(64, 64), blur=(4, 4), fill=True, only=True, padding=0)
    ours = {"seed": 5, "sampler": "Euler a", "strength": 0.7, **OURS}
    same(made.image, part.finished(served.pipe("a cat", **part.inputs, **ours).images[0]))
    kept = np.array(made.image)[:, 48:]
    assert (kept == np.array(large[0])[:, 48:]).all()
    assert np.abs(np.int16(made.image) - np.int16(large[0]))[8:40, 8:24].mean() > 5


def test_a_masked_part() -> None:
    """What the model sees of a picture whose masked part is small, at an edge, or all of it."""
    image = Image.new("RGB", (100, 60), "blue")
    image.paste((255, 0, 0), (10, 10, 30, 20))
    mask = Image.new("L", (100, 60))
    mask.paste(255, (10, 10, 30, 20))
    how: dict[str, Any] = {"blur": (0, 0), "fill": True, "only": True, "padding": 5}
    part = masked(image, mask, size=(64, 64), **how)
    assert part.box == (5, 0, 35, 30)  # 30 x 20 with its margin, made square
    assert part.inputs["mask"].size == part.inputs["image"].size == (30, 30)
    assert np.abs(np.int16(part.image) - [0, 0, 255]).max() <= 2  # no red
    drawn = Image.new("RGB", (64, 64), "lime")
    drawn.info["parameters"] = "text"
    made = part.finished(drawn)
    assert made.size == (100, 60)
    assert made.info["parameters"] == "text"
    assert made.getpixel((20, 15)) == (0, 255, 0)
    assert made.getpixel((5, 5)) == (0, 0, 255)
    whole = masked(image, mask, size=(32, 64), **how | {"only": False, "fill": False})
    assert whole.image.size == whole.mask.size == (64, 32)
    assert whole.finished(whole.image).tobytes() == whole.image.tobytes()
    full = masked(image, Image.new("L", (100, 60), 255), size=None, **how)
    assert full.box == (0, 0, 100, 60)
    assert full.image.getpixel((20, 15)) == (127, 127, 127)
    soft = masked(image, mask, size=None, **how | {"blur": (6, 0)})
    edges = np.array(soft.mask)
    assert 0 < edges[15, 7] < 128 < edges[15, 12] < 255
    assert edges[9].max() == 0  # across alone


def test_progress_and_interrupt_are_the_callers_own(served: Served) -> None:
    """Two users of one address: neither sees nor stops what the other draws."""
    done: dict[str, Any] = {}

    def draw(user: str) -> None:
        body = {"prompt": user, "steps": 300, "width": 64, "height": 64, "force_task_id": "one"}
        answer = httpx.post(
            served.url + "/sdapi/v1/txt2img", json=body, auth=(user, "x"), timeout=120
        )
        done[user] = answer.json()

    threads = [threading.Thread(target=draw, args=(user,)) for user in ("ann", "bob")]
    for thread in threads:
        thread.start()

    def progress(user: str, **query: Any) -> dict[str, Any]:
        url = served.url + "/sdapi/v1/progress"
        found: dict[str, Any] = httpx.get(url, params=query, auth=(user, "x")).json()
        return found

    until = time.monotonic() + 60
    while progress("ann", force_task_id="one")["current_image"] is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    now = progress("ann")
    assert 0 < now["progress"] < 1
    assert now["state"]["sampling_steps"] == 300
    assert now["state"]["job"] == "one"
    shown = Image.open(io.BytesIO(base64.b64decode(now["current_image"])))
    assert shown.size == (64, 64)
    assert progress("carl")["progress"] == 0.0
    for user in ("carl", "ann"):
        httpx.post(served.url + "/sdapi/v1/interrupt", auth=(user, "x")).raise_for_status()
    threads[0].join(60)
    assert done["ann"]["images"] == []
    assert progress("bob")["progress"] > 0
    url = served.url + "/sdapi/v1/interrupt?force_task_id=one"
    httpx.post(url, auth=("bob", "x")).raise_for_status()
    threads[1].join(60)
    assert json.loads(done["bob"]["info"])["all_seeds"] == []
    until = time.monotonic() + 60
    while served.service.drawer.occupied:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_there_is(api: webuiapi.WebUIApi, served: Served) -> None:
    assert api.util_get_current_model() == "tiny"
    assert [one["model_name"] for one in api.get_sd_models()] == ["tiny"]
    names = {one["name"] for one in api.get_samplers()}
    assert {"Euler a", "DPM++ 2M", "ddim"} <= names
    assert "Karras" in {one["label"] for one in api.get_schedulers()}
    assert api.get_loras()[0]["name"] == "style"
    api.set_options({"sd_model_checkpoint": "tiny", "CLIP_stop_at_last_layers": 1})
    for body, field in (
        ({"sd_model_checkpoint": "/etc/passwd"}, "sd_model_checkpoint"),
        ({"CLIP_stop_at_last_layers": 2}, "CLIP_stop_at_last_layers"),
        ({"nonsense": 1}, "nonsense"),
    ):
        answer = served.post("/sdapi/v1/options", **body)
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", field]


def coded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"styles": ["anime"]}, "styles"),
        ({"script_name": "x/y/z plot"}, "script_name"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}}, "alwayson_scripts"),
        ({"refiner_checkpoint": "xl"}, "refiner_checkpoint"),
        ({"override_settings": {"sd_vae": "x"}}, "override_settings.sd_vae"),
        (
            {"override_settings": {"sd_model_checkpoint": "x"}},
            "override_settings.sd_model_checkpoint",
        ),
        ({"sampler_name": "nothing"}, "sampler_name"),
        ({"scheduler": "nothing", "sampler_name": "Euler"}, "scheduler"),
        ({"width": 60}, "width, height"),
        ({"width": 512, "height": 512}, "width, height"),
        ({"batch_size": 5}, "batch_size"),
        ({"batch_size": 3, "n_iter": 3}, "batch_size, n_iter"),
        ({"cfg_scale": "x"}, "cfg_scale"),
        ({"steps": -1}, "steps"),
        ({"seed": -7}, "seed"),
        ({"prompt": "<lora:else:1>"}, "prompt"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_active_fields_that_cannot_be_honored(
    served: Served, change: dict[str, Any], field: str
) -> None:
    answer = served.post("/sdapi/v1/txt2img", **{**SETTINGS, "prompt": "a cat", **change})
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"] == ["body", field]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"init_images": []}, "init_images"),
        ({"init_images": ["http://127.0.0.1/a.png"]}, "init_images"),
        ({"init_images": ["/etc/passwd"]}, "init_images"),
        ({"init_images": [coded(Image.new("L", (600, 600)))]}, "init_images"),
        ({"mask": "x"}, "mask"),
        ({"mask": coded(Image.new("L", (8, 8)))}, "mask"),
        ({"mask": coded(white()), "mask_blur": -1}, "mask_blur"),
        ({"mask": coded(white()), "inpaint_full_res_padding": 5000}, "inpaint_full_res_padding"),
        ({"mask": coded(white()), "inpainting_fill": 2}, "inpainting_fill"),
        ({"denoising_strength": 2}, "denoising_strength"),
        ({"resize_mode": 1}, "resize_mode"),
    ],
)
def test_pictures_that_cannot_be_honored(
    served: Served, change: dict[str, Any], field: str
) -> None:
    body = {"init_images": [coded(picture())], "prompt": "a cat", **SETTINGS, **change}
    answer = served.post("/sdapi/v1/img2img", **body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"] == ["body", field]
