"""A folder of images: classes, captions, sizes, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_fast.training import Batches, ImageFolder


def draw(
    path: Path, colour: tuple[int, int, int] = (255, 0, 51), size: tuple[int, int] = (8, 8)
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def classes(root: Path) -> Path:
    for name, red in (("dog", 0), ("cat", 255)):
        for i in range(3):
            draw(root / name / f"{i}.png", (red, 0, 51 * i))
    return root


def captions(root: Path, lines: list[object]) -> Path:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (root / "metadata.jsonl").write_text(text)
    return root


def length(caption: str) -> Tensor:
    return torch.tensor([float(len(caption))])


def test_class_folders(tmp_path: Path) -> None:
    data = ImageFolder(classes(tmp_path), 4)
    assert data.classes == ["cat", "dog"]
    assert len(data) == 6
    image, label = data[2]
    assert label == 0
    assert image.shape == (3, 4, 4)
    assert image[:, 0, 0].tolist() == pytest.approx([1, -1, 102 / 127.5 - 1])
    assert [data[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    images, labels = next(Batches(data, 6).starting_at(0))
    assert images.shape == (6, 3, 4, 4)
    assert torch.equal(images[:, 0, 0, 0] > 0, labels == 0)


def test_captions(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "deep" / "b.JPG")
    lines = [{"file_name": "deep/b.JPG", "text": "four"}, "", {"file_name": "a.png", "text": "é"}]
    data = ImageFolder(captions(tmp_path, lines), 8, encode=length)
    assert data.captions == ["é", "four"]
    assert data[1][1].tolist() == [4]
    _, context = next(Batches(data, 2).starting_at(0))
    assert context.shape == (2, 1)


@pytest.mark.parametrize("way", ["absolute", "through another folder"])
def test_captions_of_names_in_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    draw(tmp_path / "data" / "deep" / "a.png")
    file = tmp_path / "data" / "deep" / "a.png"
    name = str(file) if way == "absolute" else "deep/../deep/a.png"
    captions(tmp_path / "data", [{"file_name": name, "text": "one"}])
    monkeypatch.chdir(tmp_path)
    assert ImageFolder("data", 8, encode=length).captions == ["one"]


@pytest.mark.parametrize("character", [*"\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"])
def test_a_caption_is_one_line_whatever_it_holds(tmp_path: Path, character: str) -> None:
    draw(tmp_path / "a.png")
    text = f"a{character}dog"
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n")
    if character < " ":  # JSON itself has these escaped
        line = json.dumps({"file_name": "a.png", "text": text})
        (tmp_path / "metadata.jsonl").write_text(f"\n{line}\n")
    assert ImageFolder(tmp_path, 4, encode=length).captions == [text]


def test_captions_that_are_not_utf_8(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "é"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl: expected UTF-8 text"):
        ImageFolder(tmp_path, 4, encode=length)


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    root = classes(tmp_path / ".data")
    draw(root / ".ipynb_checkpoints" / "0-checkpoint.png")
    draw(root / "cat" / "._0.png")
    draw(root / "cat" / ".thumbnails" / "0.png")
    (root / "__MACOSX").mkdir()
    data = ImageFolder(root, 4)
    assert data.classes == ["cat", "dog"]
    assert len(data) == 6


def test_a_loop_over_it_ends(tmp_path: Path) -> None:
    data = ImageFolder(classes(tmp_path), 4)
    assert [label for _, label in data] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data[-1][0], data[5][0])
    for index in (6, -7):
        with pytest.raises(IndexError):
            data[index]


def test_plain_images(tmp_path: Path) -> None:
    draw(tmp_path / "a.webp")
    (tmp_path / "notes.txt").write_text("not an image")
    data = ImageFolder(tmp_path, (2, 3), channels=1)
    assert len(data) == 1
    assert data[0].shape == (1, 2, 3)


def test_images_are_scaled_to_cover_and_cut_at_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255  # the middle third is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (ImageFolder(tmp_path, 4)[0] > 0.5).all()
    assert (ImageFolder(tmp_path, (8, 24))[0][:, :, 0] == -1).all()


def test_orientation_is_respected(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:2] = 255  # stored with white above
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 3  # turned by half a circle
    image.save(tmp_path / "a.png", exif=exif)
    assert (ImageFolder(tmp_path, 4)[0][:, 2:] == 1).all()


def test_pictures_of_16_bits_and_with_alpha(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.new("LA", (8, 8)).save(tmp_path / "b.png")  # transparent, so white
    data = ImageFolder(tmp_path, 8, channels=1)
    expected = torch.linspace(-1, 1, 64).view(1, 8, 8)
    assert (data[0] - expected).abs().max() < 0.01
    assert (data[1] == 1).all()


@pytest.mark.parametrize("damage", ["cut short", "not an image", "empty"])
def test_a_broken_file_is_refused_or_skipped(tmp_path: Path, damage: str) -> None:
    broken = classes(tmp_path) / "cat" / "1.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    if damage == "cut short":
        os.truncate(broken, broken.stat().st_size // 2)
    else:
        broken.write_bytes(b"no" * (damage != "empty"))
    with pytest.raises(ValueError, match=r"cat/1\.png: can't be read as an image"):
        ImageFolder(tmp_path, 4)[1]
    data = ImageFolder(tmp_path, 4, broken="skip")
    with pytest.warns(UserWarning, match=r"cat/1\.png: can't be read as an image: .*; skipped"):
        image, label = data[1]
    assert torch.equal(image, data[2][0])
    assert label == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data[1]  # named once
    with pytest.warns(UserWarning, match="skipped"):
        batch = next(Batches(ImageFolder(tmp_path, 4, broken="skip"), 6).starting_at(0))
    assert len(batch[0]) == 6


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="root: expected an image that can be read"),
    ):
        ImageFolder(tmp_path, 4, broken="skip")[0]


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root: expected images \(.*\) in .*, got none"):
        ImageFolder(tmp_path, 4)
    with pytest.raises(ValueError, match=r"root: expected a folder, got .*nowhere, which is none"):
        ImageFolder(tmp_path / "nowhere", 4)


def test_an_empty_class(tmp_path: Path) -> None:
    (classes(tmp_path) / "bird").mkdir()
    with pytest.raises(ValueError, match=r"each class folder, got 1 empty ones: .*bird"):
        ImageFolder(tmp_path, 4)


def test_images_beside_the_classes(tmp_path: Path) -> None:
    draw(classes(tmp_path) / "stray.png")
    with pytest.raises(ValueError, match=r"in class folders only, got 1 .*stray\.png"):
        ImageFolder(tmp_path, 4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"a caption for each image, got 1 images without: .*a\.png"),
        (
            [{"file_name": name, "text": "x"} for name in ("a.png", "b.png")],
            r"an image for each caption, got 1 captions without: .*b\.png",
        ),
        ([{"file_name": "a.png"}], r"line 1: expected a text 'text', got None"),
        ([{"text": "x"}], r"line 1: expected a text 'file_name', got None"),
        (["", "{"], r"line 2: can't be read as JSON"),
        (["[]"], r"line 1: expected a JSON object, got list"),
        ([{"file_name": "a.png", "text": "x"}] * 2, r"line 2: a second caption for a\.png"),
    ],
)
def test_wrong_captions(tmp_path: Path, lines: list[object], message: str) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        ImageFolder(captions(tmp_path, lines), 4, encode=length)


def test_bad_options(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    captions(tmp_path, [{"file_name": "a.png", "text": "x"}])
    with pytest.raises(ValueError, match="encode: expected a function of a caption"):
        ImageFolder(tmp_path, 4)
    with pytest.raises(ValueError, match="size: expected a positive integer"):
        ImageFolder(tmp_path, (4, 0), encode=length)
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 4"):
        ImageFolder(tmp_path, 4, channels=4, encode=length)
    with pytest.raises(ValueError, match="broken: expected one of refuse, skip"):
        ImageFolder(tmp_path, 4, broken="ignore", encode=length)
