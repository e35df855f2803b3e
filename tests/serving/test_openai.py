"""OpenAI's images API, asked by its own client."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from tiny_server import Served

from diffusion_fast.images import read_picture

EXTRA = {
    "steps": 3,
    "seed": 7,
    "guidance_scale": 4.0,
    "sampler": "euler",
    "negative_prompt": "a dog",
}


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(one: Image.Image, other: Image.Image) -> None:
    """To the rounding of float32 in a batch of another size."""
    assert one.size == other.size
    assert np.abs(np.int16(one) - np.int16(other)).max() <= 1


def test_generations(client: openai.OpenAI, served: Served) -> None:
    made = client.images.generate(
        model="tiny",
        prompt="a cat",
        n=2,
        size="64x72",  # type: ignore[arg-type]
        response_format="b64_json",
        extra_body=EXTRA,
    )
    assert made.data is not None
    truth = served.pipe("a cat", batch=2, size=(72, 64), **EXTRA)
    for one, expected in zip(made.data, truth.images, strict=True):
        same(opened(one.b64_json), expected)
    text = opened(made.data[1].b64_json).info["parameters"]
    assert "Seed: 8, Size: 64x72, Model: tiny" in text
    assert "Negative prompt: a dog" in text


def test_a_prompt_that_changes(client: openai.OpenAI, served: Served) -> None:
    asked = {"size": "64x64", "response_format": "b64_json", "extra_body": EXTRA}
    made = client.images.generate(model="tiny", prompt="a [cat:dog:0.5]", **asked)  # type: ignore[call-overload]
    truth = served.pipe("a [cat:dog:0.5]", size=64, **EXTRA)
    same(opened(made.data[0].b64_json), truth.images[0])


def test_files_for_who_wants_a_url(client: openai.OpenAI, served: Served) -> None:
    made = client.images.generate(prompt="a <lora:style:0.5> cat", extra_body=EXTRA)
    assert made.data is not None
    url = made.data[0].url
    assert url is not None
    answer = httpx.get(url)
    assert answer.headers["content-type"] == "image/png"
    same(Image.open(io.BytesIO(answer.content)), served.pipe("a  cat", **EXTRA).images[0])
    assert httpx.get(served.url + "/files/another").status_code == 404


def test_formats(client: openai.OpenAI) -> None:
    extra = EXTRA | {"output_compression": 50}
    for kind in ("jpeg", "webp"):
        made = client.images.generate(prompt="a cat", output_format=kind, extra_body=extra)  # type: ignore[call-overload]
        assert opened(made.data[0].b64_json).format == kind.upper()


def rgba(hole: bool) -> io.BytesIO:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:32, :32, 3] = 0 if hole else 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    stream.seek(0)
    stream.name = "picture.png"
    return stream


@pytest.mark.parametrize("apart", [False, True])
def test_edits_fill_what_is_transparent(client: openai.OpenAI, served: Served, apart: bool) -> None:
    pictures: dict[str, Any] = {"image": rgba(not apart)}
    if apart:
        pictures["mask"] = rgba(True)
    made = client.images.edit(
        prompt="a cat", response_format="b64_json", extra_body=EXTRA, **pictures
    )
    mask = np.zeros((64, 64), np.uint8)
    mask[:32, :32] = 255
    image = read_picture(Image.open(rgba(not apart)))
    truth = served.pipe("a cat", image=image, mask=Image.fromarray(mask), **EXTRA)
    same(opened(made.data[0].b64_json), truth.images[0])


def test_edits_without_a_mask_start_from_the_picture(client: openai.OpenAI, served: Served) -> None:
    extra = EXTRA | {"strength": 0.7}
    made = client.images.edit(
        prompt="a cat", image=rgba(False), response_format="b64_json", extra_body=extra
    )
    image = Image.open(rgba(False)).convert("RGB")
    same(opened(made.data[0].b64_json), served.pipe("a cat", image=image, **extra).images[0])


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "diffusion_fast"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "dall-e-3"}, "model"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "60x60"}, "size"),
        ({"size": "512x512"}, "size"),
        ({"quality": "hd"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"stream": True}, "stream"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a " * 6000}, "prompt"),
        ({"prompt": "<lora:other:1> a cat"}, "prompt"),
        ({"prompt": "<lora:style:1> a cat"}, "prompt"),
        ({"steps": 0}, "steps"),
        ({"steps": 500}, "steps"),
        ({"seed": -5}, "seed"),
        ({"sampler": "nothing"}, "sampler"),
        ({"guidance_scale": "much"}, "guidance_scale"),
        ({"clip_skip": 50}, "clip_skip"),
        ({"image": "http://127.0.0.1/secret"}, "image"),
    ],
)
def test_wrong_fields_are_named(served: Served, change: dict[str, Any], field: str) -> None:
    answer = served.post("/v1/images/generations", **{"prompt": "a cat", "steps": 2, **change})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")


def test_the_client_raises_with_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(prompt="a cat", n=99)
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("files", "data", "field"),
    [
        ({}, {"prompt": "a cat"}, "image"),
        ({"image": b"not a picture"}, {"prompt": "a cat"}, "image"),
        ({"image": rgba(True).read(), "mask": b"x"}, {"prompt": "a cat"}, "mask"),
        ({"image": rgba(True).read(), "mask": rgba(False).read()}, {"steps": "many"}, "prompt"),
        ({"image": rgba(True).read()}, {"prompt": "a cat", "steps": "many"}, "steps"),
        ({"image": rgba(True).read()}, {"prompt": "a cat", "nonsense": "1"}, "nonsense"),
        ({"picture": rgba(True).read()}, {"prompt": "a cat"}, "picture"),
    ],
)
def test_wrong_forms_are_named(
    served: Served, files: dict[str, bytes], data: dict[str, str], field: str
) -> None:
    sent: Any = {name: (f"{name}.png", value) for name, value in files.items()}
    if not sent:
        sent = {"prompt": (None, "a cat")}
        data = {}
    answer = httpx.post(served.url + "/v1/images/edits", files=sent, data=data)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == field
