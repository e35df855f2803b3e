"""TAESD: what it encodes and decodes is diffusers', from each layout of its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from numerics import assert_close, error
from safetensors.torch import load_file, save_file
from unet_parity import random_weights

from diffusion_fast.engine.rewrites.decoder import FreshDecoder, PreparedDecoder
from diffusion_fast.files import CheckpointError
from diffusion_fast.models.tiny_autoencoder import AutoencoderTiny
from diffusion_fast.models.tiny_autoencoder_config import TinyAutoencoderConfig

CONFIG: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (12, 12, 12),
    "num_encoder_blocks": (1, 2, 3),
    "num_decoder_blocks": (3, 1, 2),
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    model = diffusers.AutoencoderTiny(**CONFIG, scaling_factor=0.9, shift_factor=0.1)
    model.load_state_dict(random_weights(model))
    return model.eval()


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny") / "taesd"
    theirs.save_pretrained(place)
    return place


def own_layout(theirs: Any, place: Path, half: str) -> dict[str, torch.Tensor]:
    """One half under its places in TAESD's own ``nn.Sequential``, where a clamp comes first."""
    found = {}
    for name, value in theirs.state_dict().items():
        part, _, rest = name.partition(".layers.")
        if part == half:
            at, _, rest = rest.partition(".")
            found[f"{int(at) + (half == 'decoder')}.{rest}"] = value
    return found


@torch.no_grad()
def check(ours: AutoencoderTiny, theirs: Any) -> None:
    images, latents = torch.rand(2, 3, 16, 24) * 2 - 1, 2 * torch.randn(2, 4, 4, 6)
    truth = {
        "encoded": theirs.double().encode(images.double()).latents,
        "decoded": theirs.decode(latents.double()).sample,
    }
    plain = {
        "encoded": theirs.float().encode(images).latents,
        "decoded": theirs.decode(latents).sample,
    }
    result = {"encoded": ours.encode(images).mode(), "decoded": ours.decode(latents)}
    for name, value in result.items():
        assert_close(value, truth[name], plain[name])
    assert_close(PreparedDecoder(ours)(latents), truth["decoded"], plain["decoded"])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_each_layout(theirs: Any, folder: Path, tmp_path: Path, suffix: str) -> None:
    ours = AutoencoderTiny.from_pretrained(folder)
    assert ours.downsampling == 4
    assert (ours.config.scaling_factor, ours.config.shift_factor) == (0.9, 0.1)
    check(ours, theirs)
    check(AutoencoderTiny.from_pretrained(folder / "diffusion_pytorch_model.safetensors"), theirs)
    for half in ("encoder", "decoder"):
        file, state = tmp_path / f"taesd_{half}.{suffix}", own_layout(theirs, tmp_path, half)
        torch.save(state, file) if suffix == "pth" else save_file(state, file)
    for half in ("encoder", "decoder"):
        own = AutoencoderTiny.from_pretrained(tmp_path / f"taesd_{half}.{suffix}")
        check(own, theirs)
        expected = dataclasses.replace(ours.config, scaling_factor=1.0, shift_factor=0.0)
        assert own.config == expected
    alone = tmp_path / "alone.safetensors"
    save_file(load_file(folder / "diffusion_pytorch_model.safetensors"), alone)
    check(AutoencoderTiny.from_pretrained(alone), theirs)


def test_saved(theirs: Any, folder: Path, tmp_path: Path) -> None:
    ours = AutoencoderTiny.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    expected, found = (
        {k: v for k, v in json.loads((one / "config.json").read_text()).items() if k[0] != "_"}
        for one in (folder, tmp_path)
    )
    assert found | {"block_out_channels": expected["block_out_channels"]} == expected
    assert all(torch.equal(v, theirs.state_dict()[n]) for n, v in again.state_dict().items())
    assert AutoencoderTiny.from_pretrained(tmp_path).config == ours.config


def test_a_decoder_alone(theirs: Any, tmp_path: Path) -> None:
    save_file(own_layout(theirs, tmp_path, "decoder"), tmp_path / "taesd_decoder.safetensors")
    ours = AutoencoderTiny.from_pretrained(tmp_path / "taesd_decoder.safetensors")
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert error(ours.decode(latents), theirs.decode(latents).sample) < 1e-5
    with pytest.raises(ValueError, match="vae: expected a model with an encoder"):
        ours.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="save_pretrained: expected an autoencoder with both"):
        ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_rewrites_follow_the_weights(folder: Path) -> None:
    ours = AutoencoderTiny.from_pretrained(folder)
    decode = FreshDecoder(ours)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        first = decode(latents)
        assert decode._prepared is not None
        ours.decoder.levels[1].resize.conv.weight.mul_(0.5)  # type: ignore[union-attr, operator]
        expected = ours.decode(latents)
        assert error(expected, first) > 0.01
        assert error(decode(latents), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "silu"}, "act_fn: 'silu' is not supported, only 'relu'"),
        ({"decoder_block_out_channels": [8, 16, 8]}, "decoder_block_out_channels: expected one"),
        ({"num_decoder_blocks": [1, 1]}, "num_decoder_blocks: expected 3 numbers"),
        ({"num_encoder_blocks": [1, 1, 0]}, "num_encoder_blocks: expected a positive integer"),
        ({"scaling_factor": 0}, "scaling_factor: expected a positive number"),
        ({"_class_name": "AutoencoderKL"}, "_class_name: expected AutoencoderTiny"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    values = {k: list(v) for k, v in CONFIG.items()} | changes
    with pytest.raises(ValueError, match=message):
        TinyAutoencoderConfig.from_dict(values)


def test_other_files(theirs: Any, folder: Path, tmp_path: Path) -> None:
    state = own_layout(theirs, tmp_path, "encoder")
    save_file(state, tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(CheckpointError, match="an encoder alone; expected taesd_decoder"):
        AutoencoderTiny.from_pretrained(tmp_path / "taesd_encoder.safetensors")
    save_file({"model.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a tiny autoencoder \(TAESD\), got model"):
        AutoencoderTiny.from_pretrained(tmp_path / "other.safetensors")
    state = own_layout(theirs, tmp_path, "decoder")
    del state["3.conv.2.bias"]
    save_file(state, tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: decoder\.layers\.2\.conv\.2\.bias"):
        AutoencoderTiny.from_pretrained(tmp_path / "taesd_decoder.safetensors")
