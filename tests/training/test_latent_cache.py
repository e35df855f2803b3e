"""Latents and text states: computed once, the right ones, on the disk whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import survives
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast import files
from diffusion_fast.files import CheckpointError
from diffusion_fast.models.text import TextStates
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig
from diffusion_fast.training import Batches, ImageFolder, Trainer, cache_latents, latent_cache
from diffusion_fast.training.distributed import Processes
from diffusion_fast.training.tensor_store import fingerprint, write


class Vae(AutoencoderKL):
    """Counts what it encodes."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(VAEConfig.preset("tiny"))
        self.encoded = 0

    def encode(self, images: Tensor) -> Any:
        self.encoded += len(images)
        return super().encode(images)


class Texts:
    """States that tell which caption they are of; long captions have two chunks."""

    def __init__(self, pooled: bool = False, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Linear(1, 6)
        for value in self.net.parameters():  # integers: the same to the bit in any batch
            value.data.mul_(16).round_()
        self.pooled = pooled
        self.encoded: list[str] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.net}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextStates:
        self.encoded += prompts
        chunks = max(1 + (len(prompt) > 20) for prompt in prompts)
        numbers = torch.tensor([float(sum(prompt.encode())) for prompt in prompts])
        states = self.net(numbers[:, None])  # [B, 6]
        context = states[:, None] + torch.arange(7 * chunks)[:, None]  # [B, L, 6]
        return TextStates(context, states if self.pooled else None)


CAPTIONS = ("a cat", "a dog", "a cat", "a very long caption of a bird", "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    lines = []
    for i, caption in enumerate(CAPTIONS):
        noise = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.byte().numpy()).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def captioned(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(root, 16, encode=lambda caption: torch.zeros(1), **options)


def plain(root: Path) -> ImageFolder:
    (root / "metadata.jsonl").unlink(missing_ok=True)
    return ImageFolder(root, 16)


def entries(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_latents_and_states_are_the_encoders_own(root: Path, tmp_path: Path) -> None:
    images, vae, texts = captioned(root), Vae(), Texts()
    data = cache_latents(images, tmp_path / "cache", vae, texts, batch_size=2)
    assert len(data) == len(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        latents, states = data[i]
        with torch.no_grad():
            wanted = vae.scale(vae.encode(images[i][0][None]).mode())[0]
        torch.testing.assert_close(latents, wanted, atol=1e-6, rtol=0)
        assert torch.equal(states, texts.encode([caption]).context[0, :7])
    assert torch.equal(data.null_context, texts.encode([""]).context)
    assert data.null_context.shape == (1, 7, 6)


def test_everything_is_computed_once(root: Path, tmp_path: Path) -> None:
    vae, texts, calls = Vae(), Texts(), []
    cache_latents(
        *(captioned(root), tmp_path / "cache", vae, texts),
        on_made=lambda *counts: calls.append(counts),
    )
    assert vae.encoded == 5
    assert sorted(texts.encoded) == ["", "", *sorted({c for c in CAPTIONS if c})]  # "": its length
    assert calls == [(1, 2), (2, 2)]
    before = entries(tmp_path / "cache")
    assert len(before) == 5 + 4
    again, other = Vae(), Texts()
    first = cache_latents(captioned(root), tmp_path / "cache", again, other)
    assert (again.encoded, other.encoded) == (0, [])
    assert entries(tmp_path / "cache") == before
    Image.new("RGB", (9, 9)).save(root / "5.png")  # one more makes one more
    plain(root)
    second = cache_latents(ImageFolder(root, 16), tmp_path / "cache", again)
    assert again.encoded == 1
    assert torch.equal(second[0], first[0][0])


def changed_file(root: Path) -> None:
    Image.new("RGB", (20, 24), (1, 2, 3)).save(root / "2.png")
    os.utime(root / "2.png", ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "images", "encoded"),
    [
        ({"vae": Vae(1)}, {}, (5, 0)),
        ({"text": Texts(seed=1)}, {}, (0, 5)),
        ({}, {"size": 24}, (5, 0)),
        ({"flip": True}, {}, (5, 0)),
        ({}, {"touch": changed_file}, (1, 0)),
    ],
    ids=["weights", "text", "size", "flip", "file"],
)
def test_what_decides_the_numbers_is_in_the_key(
    root: Path,
    tmp_path: Path,
    change: dict[str, Any],
    images: dict[str, Any],
    encoded: tuple[int, int],
) -> None:
    cache_latents(captioned(root), tmp_path / "cache", Vae(), Texts())
    options = {"vae": Vae(), "text": Texts()} | change
    vae, texts = options["vae"], options["text"]
    images.get("touch", lambda root: None)(root)
    folder = ImageFolder(root, images.get("size", 16), encode=lambda caption: torch.zeros(1))
    data = cache_latents(folder, tmp_path / "cache", **options)
    assert (vae.encoded, len(texts.encoded)) == encoded
    assert data[2][0].shape[-1] == images.get("size", 16) // 8
    with torch.no_grad():
        wanted = vae.scale(vae.encode(folder[2][0][None]).mode())[0]
    torch.testing.assert_close(data[2][0], wanted, atol=1e-6, rtol=0)


def test_the_configuration_is_in_the_key() -> None:
    vae = Vae()
    before = fingerprint({"vae": vae})
    vae.config = VAEConfig.preset("tiny", scaling_factor=0.5)
    assert fingerprint({"vae": vae}) != before


def test_mirrored_images(root: Path, tmp_path: Path) -> None:
    """Have latents of their own; the data can't be mirrored once more."""
    images, vae = plain(root), Vae()
    data = cache_latents(images, tmp_path / "cache", vae, flip=True)
    assert len(data) == 10
    with torch.no_grad():
        wanted = vae.scale(vae.encode(images[3].flip(-1)[None]).mode())[0]
    torch.testing.assert_close(data[5 + 3], wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(data[5 + 3], data[3].flip(-1), atol=1e-3)
    with pytest.raises(ValueError, match="flip: expected False, because this data set"):
        Batches(data, 2, flip=True)


def test_classes(tmp_path: Path) -> None:
    for name, colour in (("cat", 10), ("dog", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (colour, 0, 0)).save(tmp_path / "images" / name / "a.png")
    data = cache_latents(ImageFolder(tmp_path / "images", 16), tmp_path / "cache", Vae(), flip=True)
    assert [data[i][1] for i in range(4)] == [0, 1, 0, 1]
    assert data.null_context is None


def test_a_restart_makes_what_is_missing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = cache_latents(plain(root), tmp_path / "whole", Vae(), batch_size=1)
    write, calls = latent_cache.write, 0

    def full_disk(path: Path, tensors: dict[str, Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "write", full_disk)
        with pytest.raises(OSError, match="No space left"):
            cache_latents(plain(root), tmp_path / "cache", Vae(), batch_size=2)
    assert len(entries(tmp_path / "cache")) == 3
    vae = Vae()
    data = cache_latents(plain(root), tmp_path / "cache", vae, batch_size=1)
    assert vae.encoded == 2
    assert all(torch.allclose(data[i], truth[i], atol=1e-6) for i in range(5))


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(files, "flush", fails)
    with pytest.raises(OSError, match="killed"):
        write(tmp_path / "a.safetensors", {"latents": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(root: Path, tmp_path: Path) -> None:
    data = cache_latents(plain(root), tmp_path / "cache", Vae())
    victim = data._latents[2]
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{victim.name}: can't be read"):
        data[2]


@pytest.mark.parametrize("pooled", [False, True])
def test_no_flipped_bit_is_read(root: Path, tmp_path: Path, pooled: bool) -> None:
    """Of any byte of a file, header included: the numbers that were written, or its name."""
    data = cache_latents(captioned(root), tmp_path / "cache", Vae(), Texts(pooled))
    for victim in (data._latents[0], data._conditions[0]):
        written, whole, read = deepcopy(data[0]), victim.read_bytes(), []  # data[0] is mapped
        for i in range(len(whole)):
            victim.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
            if (found := survives(lambda: data[0], (CheckpointError,), [victim], i)) is not None:
                torch.testing.assert_close(found, written, rtol=0, atol=0)
                read.append(i)
        assert max(read, default=0) < 8 + int.from_bytes(whole[:8], "little")  # in the header
        with pytest.raises(CheckpointError, match="remove it and cache the latents again"):
            data[0]
        victim.unlink()
        cache_latents(captioned(root), tmp_path / "cache", Vae(), Texts(pooled))
        torch.testing.assert_close(data[0], written, rtol=0, atol=1e-6)


def test_a_file_of_an_older_version_has_no_checksum(root: Path, tmp_path: Path) -> None:
    data = cache_latents(plain(root), tmp_path / "cache", Vae())
    latents = data[0]
    save_file({"latents": latents}, data._latents[0])
    assert torch.equal(data[0], latents)


def test_broken_images_are_refused_or_left_out(root: Path, tmp_path: Path) -> None:
    (root / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png: can't be read as an image"):
        cache_latents(captioned(root), tmp_path / "cache", Vae(), Texts())
    with pytest.warns(UserWarning, match=r"1\.png"):
        data = cache_latents(captioned(root, broken="skip"), tmp_path / "cache", Vae(), Texts())
    assert len(data) == 4
    states = Texts().encode(["a cat"]).context[0]
    assert torch.equal(data[1][1], states)  # that of image 2


def test_processes_share_the_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = cache_latents(plain(root), tmp_path / "whole", Vae(), batch_size=1)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    counts = []
    for rank in (1, 0):
        monkeypatch.setattr(Processes, "join", lambda device, rank=rank: Processes(rank, 2))
        vae = Vae()
        data = cache_latents(plain(root), tmp_path / "cache", vae, batch_size=1)
        counts.append(vae.encoded)
    assert counts == [2, 3]
    assert all(torch.equal(data[i], truth[i]) for i in range(5))


def test_bad_input(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text: expected text encoders, because"):
        cache_latents(captioned(root), tmp_path / "cache", Vae())
    with pytest.raises(ValueError, match="batch_size"):
        cache_latents(plain(root), tmp_path / "cache", Vae(), batch_size=0)
    with pytest.raises(ValueError, match="multiples of 8"):
        cache_latents(ImageFolder(root, 20), tmp_path / "cache", Vae())
    assert entries(tmp_path / "cache") == {}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_whole_stable_diffusion(root: Path, tmp_path: Path, kind: str) -> None:
    """The U-Net of a (tiny) pipeline learns from the cache, with a tenth of empty prompts."""
    from diffusion_fast.models.text import TextEncoders
    from diffusion_fast.pipelines.tiny import make_tiny

    model = make_tiny(tmp_path / "model", kind)
    vae, text = AutoencoderKL.from_pretrained(model), TextEncoders.from_pretrained(model)
    images = ImageFolder(root, 64, encode=lambda caption: torch.zeros(1))
    data = cache_latents(images, tmp_path / "cache", vae, text)
    trainer = Trainer(
        df.UNet2DCondition.from_pretrained(model),
        Batches(data, 4, seed=0),
        df.DiffusionSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012),
        null_context=data.null_context,
        **{"condition_dropout": 0.1, "learning_rate": 1e-3, "seed": 0},
    )
    losses = trainer.fit(30)
    assert sum(losses[-5:]) < sum(losses[:5])
    latents, states = data[0]
    assert latents.shape == (4, 8, 8)
    if kind == "sdxl":
        assert states["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]
        assert states["text_embeds"].shape == (32,)
        assert data.null_context["context"].shape == (1, *states["context"].shape)
