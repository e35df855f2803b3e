"""Pictures: the grid's pixels, settings in the PNG, nothing half-written."""

from __future__ import annotations

import json
import struct
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
    images.save_picture(images.grid(torch.zeros(1, 1, 4, 4), 1), path, {"seed": 3})
    assert json.loads(Image.open(path).text[images.SETTINGS]) == {"seed": 3}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("b", "PNG"), ("c.jpg", "JPEG"), ("d.JPEG", "JPEG"), ("e.webp", "WEBP")],
)
def test_the_suffix_decides_the_format(tmp_path: Path, name: str, kind: str) -> None:
    picture = images.grid(torch.zeros(1, 3, 16, 16), 1)
    picture.info[images.PARAMETERS] = "a cät \U0001f431\nSteps: 2"
    settings = {"seed": 3, "prompt": ["ü", "\udce4"]}
    images.save_picture(picture, tmp_path / name, settings)
    with Image.open(tmp_path / name) as found:
        assert found.format == kind
        assert np.abs(np.asarray(found).astype(int) - np.asarray(picture)).max() < 20
        comment = found.getexif().get_ifd(0x8769).get(0x9286, b"UNICODE\0")
        text = found.info.get("parameters") or comment[8:].decode("utf-16-be")
        assert text == picture.info[images.PARAMETERS]
    assert images.read_settings(tmp_path / name) == settings
    images.save_picture(picture, tmp_path / name, None)
    with pytest.raises(ValueError, match="carries its settings"):
        images.read_settings(tmp_path / name)
    with Image.open(tmp_path / name) as found:
        assert not found.getexif()
        assert "parameters" not in found.info


def test_other_suffixes_and_too_long_settings(tmp_path: Path) -> None:
    picture = images.grid(torch.zeros(1, 3, 16, 16), 1)
    with pytest.raises(ValueError, match=r"expected a name of PNG, JPEG or WebP .* got .*x\.tga"):
        images.save_picture(picture, tmp_path / "x.tga", {})
    with pytest.raises(ValueError, match=r"x\.jpg: can't hold its settings .*; a PNG can"):
        images.save_picture(picture, tmp_path / "x.jpg", {"prompt": "a" * 70_000})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    picture = images.grid(torch.zeros(1, 1, 4, 4), 1)
    images.save_picture(picture, path, {})
    before = path.read_bytes()

    def full(self: Image.Image, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        images.save_picture(picture, path, {})
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
    with pytest.raises(ValueError, match=r"y\.png: expected a picture that carries its settings"):
        images.read_settings(tmp_path / "y.png")


RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (8, 1))  # [8, 16]
WIDE = RAMP.astype(np.uint16) * 257
MODES = ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I;16L", "LA", "La"]
MODES += ["PA", "RGBA", "RGBa", "RGBX"]


def in_mode(mode: str) -> Image.Image:
    """The ramp; white and black only where a mode has no more."""
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (16, 8), WIDE.astype(">u2" if mode[-1] == "B" else "<u2"))
    for step in {"La": ("LA",), "RGBa": ("RGBA",), "PA": ("P",), "HSV": ("RGB",)}.get(mode, ()):
        return Image.fromarray(RAMP).convert(step).convert(mode)
    return Image.fromarray(RAMP).convert(mode, dither=Image.Dither.NONE)


@pytest.mark.parametrize("target", ["RGB", "L"])
@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_the_same_in_every_mode(mode: str, target: str) -> None:
    found = images.read_picture(in_mode(mode), target)
    assert found.mode == target
    expected = np.where(RAMP < 128, 0, 255) if mode == "1" else RAMP
    if target == "RGB":
        expected = np.repeat(expected[..., None], 3, axis=-1)
    off = np.abs(np.asarray(found).astype(int) - expected)
    assert off.max() <= (6 if mode in ("P", "PA") else 2)  # a palette of 6 levels a channel


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("wide.png", Image.fromarray(WIDE)),
        ("wide.tif", Image.fromarray(WIDE)),
        ("wide.jp2", Image.fromarray(WIDE)),
        ("plain.webp", Image.fromarray(RAMP)),
    ],
)
def test_files_of_many_bits(tmp_path: Path, name: str, picture: Image.Image) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    picture.save(tmp_path / name, **options)
    (tmp_path / name).rename(tmp_path / "any.name")  # the first bytes tell what it is
    found = np.asarray(images.read_picture(tmp_path / "any.name", "L"))
    assert np.abs(found.astype(int) - RAMP).max() <= 1


def tiff(path: Path, pixels: np.ndarray, **tags: tuple[int, int]) -> None:
    """A 16-bit TIFF, some of whose numbers (width, bits, white) are another one."""
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    for name, (old, new) in tags.items():
        tag = {"width": 256, "bits": 258, "white": 262}[name]
        kinds = [struct.pack("<HHIH", tag, kind, 1, old) for kind in (3, 4)]
        entry = next(kind for kind in kinds if kind in data)
        data = data.replace(entry, entry[:8] + struct.pack("<H", new))
    path.write_bytes(data)


def test_tiff_with_white_as_zero_and_with_12_bits(tmp_path: Path) -> None:
    tiff(tmp_path / "white.tif", 65535 - WIDE, white=(1, 0))
    assert np.array_equal(np.asarray(images.read_picture(tmp_path / "white.tif", "L")), RAMP)
    twelve = RAMP.astype(int) * 4095 // 255
    first, second = twelve[:, ::2], twelve[:, 1::2]  # in three bytes
    packed = np.stack((first >> 4, (first & 15) << 4 | second >> 8, second & 255), -1)
    rows = packed.astype(np.uint8).reshape(8, 24).view("<u2").astype(np.uint16)
    tiff(tmp_path / "twelve.tif", rows, width=(12, 16), bits=(16, 12))
    found = np.asarray(images.read_picture(tmp_path / "twelve.tif", "L"))
    assert np.abs(found.astype(int) - RAMP).max() <= 1


def hidden(mode: str) -> Image.Image:
    """Left half visible and black, right half transparent."""
    alpha = np.zeros((4, 8), np.uint8)
    alpha[:, :4] = 255
    picture = Image.new("LA" if "L" in mode else "RGBA", (8, 4), 0)
    picture.putalpha(Image.fromarray(alpha))
    return picture.convert(mode) if mode in ("La", "RGBa") else picture


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_what_is_transparent_shows_the_background(mode: str) -> None:
    picture = hidden(mode)
    for background, value in (("white", 255), ("black", 0)):
        for target in ("RGB", "L"):
            found = np.asarray(images.read_picture(picture, target, background))
            assert (found[:, :4] == 0).all()
            assert (found[:, 4:] == value).all()


@pytest.mark.parametrize(
    ("pixels", "key"),
    [
        (np.array([[0, 7]], np.uint8), 7),
        (np.array([[0, 300]], np.uint16), 300),
        (np.array([[[0, 0, 0], [1, 2, 3]]], np.uint8), (1, 2, 3)),
    ],
)
def test_a_color_may_stand_for_transparent(tmp_path: Path, pixels: np.ndarray, key: object) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=key)
    assert np.asarray(images.read_picture(tmp_path / "x.png", "L")).tolist() == [[0, 255]]
    paletted = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    paletted.save(tmp_path / "x.gif", transparency=1)
    assert np.asarray(images.read_picture(tmp_path / "x.gif", "L")).tolist() == [[0, 255]]


@pytest.mark.parametrize("picture", [RAMP, WIDE], ids=["8", "16"])
def test_pictures_are_upright(tmp_path: Path, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    for source in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        assert np.array_equal(np.asarray(images.read_picture(source, "L")), np.rot90(RAMP, -1))


@pytest.mark.parametrize(("mode", "kind"), [("F", "floating point"), ("I", "32-bit integers")])
def test_a_range_that_is_not_known_is_refused(tmp_path: Path, mode: str, kind: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
    for source in (tmp_path / "x.tif", Image.new(mode, (4, 4))):
        with pytest.raises(ValueError, match=f"its mode is '{mode}' .{kind}"):
            images.read_picture(source)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE HTML><html>404</html>", "a web page"),
        (b"<html>404</html>", "a web page"),
        (b"\x89PNG\r\n\x1a\nhalf", "can't be read as an image"),
        (b"words", "cannot identify image file"),
        (None, "No such file"),
    ],
)
def test_no_pictures_are_named(tmp_path: Path, data: bytes | None, reason: str) -> None:
    if data is not None:
        (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        images.read_picture(tmp_path / "x.png")
