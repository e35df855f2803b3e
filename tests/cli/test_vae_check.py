"""``diffusion-fast vae-check``: the table is right, and what can't be checked is named."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from diffusion_fast.models import vae_memory
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    AutoencoderKL(VAEConfig.preset("tiny")).save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images, one in a folder of its own, and a text, in a folder with a short name."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, size, mode in (("a.png", (45, 70), "RGB"), ("more/b.jpg", (64, 64), "L")):
        path = Path("photos") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    Path("photos/notes.txt").write_text("no image")
    return Path("photos")


def _rows(stdout: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in stdout.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


def _psnr(folder: Path, pixels: np.ndarray) -> float:
    """By the definition, from the pixels [H, W, 3]."""
    vae = AutoencoderKL.from_pretrained(folder)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).mode())
    drawn = ((y[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    return 10 * math.log10(255**2 / np.square(drawn - pixels.astype(float)).mean())


def test_shows_the_psnr_of_each_image_and_the_mean(vae: Path, photos: Path) -> None:
    done = run("vae-check", "--model", vae, photos)
    assert done.returncode == 0, done.stderr
    rows = _rows(done.stdout)
    first, second = rows[str(photos / "a.png")], rows[str(photos / "more" / "b.jpg")]
    assert [first[0], first[2]] == ["40 x 64", "whole"]  # cut at the middle
    assert second[0] == "64 x 64"
    expected = _psnr(vae, np.array(Image.open(photos / "a.png"))[3:67, 2:42])
    assert float(first[1]) == pytest.approx(expected, abs=0.02)
    assert 3 < float(first[1]) < 20  # the weights are random
    assert float(rows["mean"][1]) == pytest.approx(
        (float(first[1]) + float(second[1])) / 2, abs=0.01
    )


def test_16_bits_are_as_8(vae: Path, photos: Path) -> None:
    grey = np.array(Image.open(photos / "more" / "b.jpg"))
    Image.fromarray(grey).save("8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("16.png")
    rows = _rows(run("vae-check", "--model", vae, "8.png", "16.png").stdout)
    assert rows["8.png"] == rows["16.png"]


def test_size_scales_images(vae: Path, photos: Path) -> None:
    done = run("vae-check", "--model", vae, "--size", 24, photos / "a.png", photos / "more")
    assert done.returncode == 0, done.stderr
    sizes = [row[0] for name, row in _rows(done.stdout).items() if name.startswith(str(photos))]
    assert sizes == ["24 x 24", "24 x 24"]


def test_a_perfect_round_trip_has_no_end(
    vae: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.from_numpy(np.array(Image.open(photos / "a.png"))[3:67, 2:42])
    exact = image.permute(2, 0, 1)[None] / 127.5 - 1
    found = vae_memory.Decoded(exact, "tiled")
    monkeypatch.setattr(vae_memory, "decode", lambda *_: found)
    row = _rows(run("vae-check", "--model", vae, photos / "a.png").stdout)[str(photos / "a.png")]
    assert row[1:] == ["inf", "whole, then tiled"]


def test_errors_name_the_thing(vae: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:2000])
    Image.new("RGB", (70, 7)).save(photos / "flat.png")
    AutoencoderKL(VAEConfig.preset("tiny", in_channels=1)).save_pretrained(tmp_path / "grey")
    for arguments, message in (
        ((vae, photos / "notes.txt"), f"{photos}/notes.txt: can't be read as an image"),
        ((vae, photos / "cut.png"), f"{photos}/cut.png: can't be read as an image"),
        (
            (vae, photos / "flat.png"),
            f"{photos}/flat.png: expected at least 8 x 8 pixels, got 70 x 7",
        ),
        ((vae, photos / "no.png"), f"IMAGES: expected images or folders, got {photos}/no.png"),
        ((vae, tmp_path / "empty"), r"IMAGES: expected images \(.*\) in .*empty, got none"),
        ((tmp_path / "empty", photos), "not a diffusers model"),
        ((tmp_path / "nowhere", photos), "nowhere"),
        (
            (tmp_path / "grey", photos),
            "--model: expected an autoencoder of 3 channels, got 1 and 3",
        ),
        ((vae, photos, "--size", 36), "--size: expected a multiple of 8, got 36"),
        ((vae, photos, "--device", "cuda:9"), "--device: expected one that works"),
    ):
        done = run("vae-check", "--model", *arguments)
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert run("vae-check", "--model", vae).returncode == 2  # no images


def test_overflow_is_named(vae: Path, photos: Path, tmp_path: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(torch.inf)
    model.save_pretrained(tmp_path / "broken")
    done = run("vae-check", "--model", tmp_path / "broken", photos / "a.png")
    assert done.returncode == 1
    assert f"error: {photos / 'a.png'}: the model decodes to values that are not" in done.stderr


def test_the_tiny_model_says_that_its_weights_are_random(photos: Path) -> None:
    done = run("vae-check", "--model", "tiny", photos)
    assert done.returncode == 0, done.stderr
    assert "tiny: random weights" in done.stderr
    assert len(_rows(done.stdout)) == 3  # two images and their mean
