"""Damaged pictures, settings, prompts: an error of ours or a right result, and no other end."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutated, mutated_json, survives, write
from PIL import Image

from diffusion_fast.cli.sample import read_drawing
from diffusion_fast.cli.sample_many import read_prompts
from diffusion_fast.images import read_picture, read_settings, save_picture
from diffusion_fast.models.prompt import parse, tokenize
from diffusion_fast.models.text import load_tokenizers
from diffusion_fast.pipelines import make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SETTINGS: dict[str, Any] = {
    "kind": "prompts",
    "model": "tiny",
    "prompt": ["a cat", "ein Bär"],
    "seed": 3,
    "steps": "2,3",
    "eta": 0.5,
    "lora": ["a.safetensors=0.5"],
    "digests": {"image": "0123"},
    "resolved": {"size": [64, 64]},
}
PROMPTS = [
    "a (red:1.3) cat, [dark] BREAK (((photo))) of \\(a dog\\)",
    "[a:b:0.5] AND <lora:x:1> embedding:y {a|b} (c:nan)",
    "x" * 200 + " (very (long [words]:1.1):0.9) \U0001f431",
]


def picture(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    image = image if kind in ("PNG", "TIFF", "WEBP") else image.convert("RGB")
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(data, kind, **({} if kind in ("BMP", "GIF", "PPM") else {"exif": exif}))
    return data.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_pictures(tmp_path: Path, kind: str) -> None:
    data = picture(kind)
    for seed in range(40):
        path = write(tmp_path / "x", mutated(data, seed))
        for mode in ("RGB", "L"):
            found = survives(
                lambda path=path, mode=mode: read_picture(path, mode),
                (ValueError,),
                ["can't be read as an image: "],
                seed,
            )
            assert found is None or found.mode == mode


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_settings_in_files(tmp_path: Path, name: str) -> None:
    save_picture(Image.new("RGB", (16, 16)), tmp_path / name, SETTINGS)
    data = (tmp_path / name).read_bytes()
    for seed in range(60):
        path = write(tmp_path / name, mutated(data, seed))
        found = survives(lambda path=path: read_settings(path), (ValueError,), [path], seed)
        assert found is None or isinstance(found, dict)


def test_edited_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for seed in range(150):
        settings = mutated_json(SETTINGS, seed)
        if not isinstance(settings, dict):
            continue
        save_picture(Image.new("RGB", (8, 8)), path, settings)
        drawing = survives(lambda: read_drawing(path), (ValueError,), ["--again: ", path], seed)
        if drawing is not None:
            assert isinstance(drawing.model, str)
            assert json.loads(json.dumps(vars(drawing))) == vars(drawing)


def test_files_of_prompts(tmp_path: Path) -> None:
    data = "\ufeff" + "\r\n".join([*PROMPTS, "", "ein Bär\u2028x", "a cat"])
    for seed in range(150):
        encoding = ("utf-8", "utf-16", "latin-1")[seed % 3]
        raw = data.encode(encoding, errors="replace")
        path = write(tmp_path / "prompts.txt", mutated(raw, seed))
        found = survives(lambda path=path: read_prompts(path), (ValueError,), ["--prompts"], seed)
        assert found is None or (found and all(one == one.strip() and one for one in found))


def test_prompts(tmp_path: Path) -> None:
    [tokenizer] = load_tokenizers(make_tiny(tmp_path / "tiny"), ["text_encoder"])
    for seed in range(300):
        data = mutated(PROMPTS[seed % 3].encode(), seed)
        prompt = data.decode(errors=("surrogateescape", "replace")[seed % 2])

        def read(prompt: str = prompt) -> Any:
            parse(prompt)
            return tokenize([prompt, ""], tokenizer)

        tokens = survives(read, (ValueError,), ["prompt: expected "], seed)
        if tokens is not None:
            assert tokens.ids.shape == tokens.weights.shape
            assert tokens.weights.isfinite().all()
            assert re.sub(r"\W", "", prompt) == "" or len(tokens.ids[0].unique()) > 2
