"""Pictures: the grid's pixels, settings in the PNG, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_fast import images


def test_a_grid_puts_every_image_in_its_place() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 5.0, float(-9)]).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    pixels = np.asarray(images.grid(x, columns=3, scale=2, gap=1))
    assert pixels.shape == (2 * 5 + 1, 3 * 7 + 1)
    corners = [pixels[1 + 5 * (i // 3), 1 + 7 * (i % 3)] for i in range(6)]
    assert corners == [0, 128, 255, 255, 0, 64]
    assert (pixels[0] == 64).all()
    assert images.grid(torch.zeros(2, 3, 4, 4), columns=2).mode == "RGB"


def test_the_file_carries_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.png"
    images.save_png(images.grid(torch.zeros(1, 1, 4, 4), 1), path, {"seed": 3})
    assert json.loads(Image.open(path).text[images.SETTINGS]) == {"seed": 3}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    picture = images.grid(torch.zeros(1, 1, 4, 4), 1)
    images.save_png(picture, path, {})
    before = path.read_bytes()

    def full(self: Image.Image, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        images.save_png(picture, path, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (1, 4, 4), (0, 1, 4, 4)])
def test_bad_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x: expected shape"):
        images.grid(torch.zeros(shape), 1)


def test_headings_are_a_line_above_the_images() -> None:
    x = torch.full((4, 3, 20, 60), -1.0)
    plain = np.asarray(images.grid(x, columns=2))
    headed = np.asarray(images.grid(x, columns=2, headings=["one", "two"]))
    assert (headed[images.LINE :] == plain).all()
    line = headed[: images.LINE].max(axis=(0, 2))
    assert (line[:62] > 200).any()
    assert (line[64:] > 200).any()
    with pytest.raises(ValueError, match="headings: expected none, or one for each of 2"):
        images.grid(x, columns=2, headings=["one"])


def test_pil_images() -> None:
    colours = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 2, 5)
    found = images.to_pil(colours)
    assert [(image.size, image.mode) for image in found] == [((5, 2), "RGB")] * 2
    assert found[0].getpixel((4, 1)) == (0, 128, 255)
    assert images.to_pil(colours[:, :1])[0].mode == "L"


@pytest.mark.parametrize("settings", [None, "[1]"])
def test_a_file_without_settings(tmp_path: Path, settings: str | None) -> None:
    info = images.PngInfo()
    if settings:
        info.add_text(images.SETTINGS, settings)
    Image.new("L", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ValueError, match="settings"):
        images.read_settings(tmp_path / "x.png")
    (tmp_path / "y.png").write_text("no image")
    with pytest.raises(ValueError, match=r"y\.png: expected a PNG that carries its settings"):
        images.read_settings(tmp_path / "y.png")
