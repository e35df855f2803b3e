"""The emoji example's parts: what is said of pictures, what reads it, and a run that goes on."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


def apple(hue: float, size: int = 64) -> NDArray[np.uint8]:
    """A disc of one hue with a dark stem, on white."""
    from captions import rotated

    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    image = np.full((size, size, 3), 255, np.uint8)
    image[x**2 + y**2 < (0.4 * size) ** 2] = (220, 40, 40)
    image[: size // 3, size // 2] = (60, 50, 40)
    return rotated(image, hue)


def data_set(names: int = 60) -> tuple[list, NDArray[np.uint8]]:
    """Red discs with as many names, one of them with a color, in three styles."""
    from captions import STYLES, Picture

    pictures = [
        Picture(f"{name}-{style}.png", name, ("round",), style, "red", 0.0, "")
        for name in ("red disc", *(f"thing{i}" for i in range(names - 1)))
        for style in STYLES
    ]
    return pictures, np.stack([apple(0)] * len(pictures))


@pytest.mark.parametrize("degrees", (0, 360, -720))
def test_a_full_turn_of_hues_changes_nothing(degrees: float) -> None:
    from captions import rotated

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.abs(rotated(image, degrees).astype(int) - image).max() <= 1


@pytest.mark.parametrize("hue", range(0, 360, 45))
def test_a_recolored_picture_has_the_color_it_was_given(hue: int) -> None:
    from captions import COLORS, dominant_color, recolored

    image = apple(hue)
    _, found = dominant_color(image)
    assert found is not None
    for color in COLORS:
        assert dominant_color(recolored(image, found, color))[0] == color


def test_pictures_without_color_have_none() -> None:
    from captions import dominant_color

    gray = np.repeat(apple(0).mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    assert dominant_color(gray) == (None, None)
    assert dominant_color(np.full((8, 8, 3), 255, np.uint8)) == (None, None)


def test_captions_name_what_they_show() -> None:
    from captions import Picture, captions_of

    picture = Picture("a.png", "red apple", ("fruit", "red"), "flat", "red", 2.0, "")
    captions = captions_of(picture, 8, random.Random(0))
    assert len(captions) == 8
    assert all("red apple" in caption for caption in captions)
    assert {"red apple", "a red apple", "red apple, flat style"} <= set(captions)
    green = Picture("a.png", "red apple", (), "flat", "green", 120.0, "")
    assert "a green apple" in captions_of(green, 8, random.Random(0))


def test_composed_captions_are_never_trained_on() -> None:
    from captions import composed
    from train_diffusion import copies

    pictures, pixels = data_set()
    pairs = composed(pictures)
    assert len(set(pairs)) == 50
    images, numbers, words = copies(pictures, pixels)
    assert len(numbers) == len(words)
    assert max(numbers) == len(images) - 1
    assert not [w for w in words for color, name in pairs if f"{color} {name}," in f"{w},"]
    assert any(word.startswith("a blue thing") for word in words)


def test_the_tokenizer_splits_as_transformers_does(tmp_path: Path) -> None:
    from text import LENGTH, token_ids, train_tokenizer

    captions = ["a red apple, noto style", "piñata, 3d style", "man's shoe", "a red piñata"] * 3
    tokenizer = train_tokenizer(captions, tmp_path)
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("red</w>", "style</w>", "apple</w>")]
    assert tokenizer.tokenize("a red apple, 3d") == ["a</w>", "red</w>", "apple</w>", ",</w>",
                                                     "3</w>", "d</w>"]  # fmt: skip
    ids = token_ids(tokenizer, [*captions, "", "Zeppelin 日本 🍎"])
    assert ids.shape == (len(captions) + 2, LENGTH)
    unknown = tokenizer.decode(ids[-1], skip_special_tokens=True)
    assert unknown.replace(" ", "") == "zeppelin日本🍎"


def test_a_package_that_is_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import packages

    name = "emoji-datasource-google"
    archive = tmp_path / f"{name}-{packages.PACKAGES[name][0]}.tgz"
    archive.write_bytes(b"something else")
    wrong = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"{archive.name}: expected SHA-256 .*, got {wrong}"):
        packages.fetch(name, tmp_path)
    archive.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm: not found"):
        packages.fetch(name, tmp_path)


def test_the_autoencoder_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: an interrupted run saves itself, and the next one makes the steps after it."""
    import train_vae

    pictures, pixels = data_set(4)
    whole = train_vae.train(pictures, pixels, 2, tmp_path / "whole.pt").state_dict()
    advance = train_vae.Run.advance

    def interrupted(run: train_vae.Run, *args: object) -> object:
        if run.step:
            raise KeyboardInterrupt
        return advance(run, *args)

    monkeypatch.setattr(train_vae.Run, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_vae.train(pictures, pixels, 2, tmp_path / "parts.pt")
    monkeypatch.setattr(train_vae.Run, "advance", advance)
    parts = train_vae.train(pictures, pixels, 2, tmp_path / "parts.pt").state_dict()
    assert all(torch.equal(whole[name], value) for name, value in parts.items())


def test_the_decoder_alone_leaves_latents_as_they_are(tmp_path: Path) -> None:
    import train_vae

    pictures, pixels = data_set()
    before = train_vae.AutoencoderKL(train_vae.CONFIG).state_dict()
    file = tmp_path / "decoder.pt"
    after = train_vae.train(pictures, pixels, 2, file, start=before).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_a_missed_aim_is_said() -> None:
    from report import page

    good = {"training captions": 0.9, "composed: both": 0.6, "spread": 0.1}
    poor = {"training captions": 0.5, "composed: both": 0.2, "spread": 0.1}
    found = {
        "steps": 25,
        "best guidance": 3.0,
        "guidance": {"1": poor, "3": good},
        "distances": {"spread": 0.2},
        "judges": {"color": 0.9},
        "autoencoder": {"mean dB": 25.0},
        "few steps": {"ddim": {"5": {"distance": 0.1, "read as asked": 0.5}}},
    }
    text = page(found)
    assert "training captions: 90.0% at guidance 3; the aim of 80% is reached." in text
    assert "composed: both: 60.0% at guidance 3; the aim of 50% is reached." in text
    found["guidance"] = {"1": poor}
    assert "composed: both: 20.0% at guidance 1; the aim of 50% is missed." in page(found)


@pytest.mark.slow  # a whole run, if a short one: half a minute
def test_a_run_ends_with_a_model_that_diffusers_loads_and_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    import evaluate
    import judges
    import make_data
    import train
    from PIL import Image
    from report import write_report

    import diffusion_fast as df

    pictures, pixels = data_set(110)
    (tmp_path / "data").mkdir()
    lines = []
    for picture, image in zip(pictures, pixels, strict=True):
        file = tmp_path / "data" / picture.file_name
        Image.fromarray(image).save(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        lines.append(json.dumps({**vars(picture), "sha256": digest, "text": picture.name}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    assert [one.name for one in make_data.load(tmp_path)[0]] == [one.name for one in pictures]

    vae = train.autoencoder(tmp_path, 1, "cpu")
    vae = train.sharper(tmp_path, vae, 1, "cpu")
    train.diffusion(tmp_path, vae, 2, "cpu")
    pipe = df.StableDiffusion.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = pipe("a blue thing7", steps=4, guidance_scale=3.0, output="tensor").images
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = theirs(
        "a blue thing7",
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=generator,
        output_type="pt",
    ).images
    assert (ours - (2 * expected - 1)).abs().max() < 1e-3

    for module, name, value in (
        (judges, "STEPS", 2),
        (evaluate, "GUIDANCE", (1.0, 3.0)),
        (evaluate, "STEPS", 3),
        (evaluate, "FEW", (1,)),
        (evaluate, "MANY", 2),
    ):
        monkeypatch.setattr(module, name, value)
    results = tmp_path / "results"
    write_report(evaluate.Evaluation(tmp_path, tmp_path / "model", results).run(), results)
    text = (results / "README.md").read_text()
    assert "the aim of 50% is missed" in text
    for name in re.findall(r"\((\w+\.png)\)", text):
        assert min(Image.open(results / name).size) > 60
    (tmp_path / "data" / pictures[0].file_name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{pictures[0].file_name}: changed"):
        make_data.load(tmp_path)
