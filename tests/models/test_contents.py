"""Files are known by what is in them, whatever their names say."""

from __future__ import annotations

import argparse
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compvis_files import VAES, vae_states
from safetensors.torch import load_file, save_file
from small_unets import small_config

from diffusion_fast.models import AutoencoderKL, CheckpointError, UNet2DCondition, VAEConfig
from diffusion_fast.models.checkpoints import WEIGHTS
from diffusion_fast.models.lora import LoRAs
from diffusion_fast.models.tensors import read, stored

Read = Callable[[Path], Any]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"


def as_unet(file: Path) -> Any:
    return UNet2DCondition.from_pretrained(file)


def as_vae(file: Path) -> Any:
    return AutoencoderKL.from_pretrained(file, scaling_factor=1.0)


def as_lora(file: Path) -> Any:
    LoRAs({"unet": UNet2DCondition(small_config())}).load(file, "x")


readers = pytest.mark.parametrize("read_it", [as_unet, as_vae, as_lora])


@readers
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "bin", "txt"])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (LFS, "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b'{"error": "Repository not found"}', "a JSON file"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 90, "a picture"),
        (b"GGUF" + b"\x03\x00\x00\x00" * 9, "a GGUF file"),
        (b"\x1f\x8b" + b"\x00" * 90, "a compressed archive"),
    ],
    ids=["lfs", "html", "json", "png", "gguf", "gzip"],
)
def test_what_is_no_file_of_tensors(
    data: bytes, kind: str, suffix: str, read_it: Read, tmp_path: Path
) -> None:
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"got {kind}") as caught:
        read_it(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("read_it", [as_unet, as_vae])
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_down_blocks_0_x.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.x.lora_A.weight"], "a LoRA"),
        (["lora_unet_x.hada_w1_a"], "a LoRA"),
        (["emb_params"], "an embedding"),
        (["clip_l", "clip_g"], "an embedding"),
        (["<token>"], "an embedding"),
    ],
)
def test_adapters_and_embeddings_in_the_place_of_a_model(
    names: list[str], kind: str, read_it: Read, tmp_path: Path
) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"{kind}.* is not supported"):
        read_it(tmp_path / "x.safetensors")


@readers
def test_an_embedding_of_the_older_kind(read_it: Read, tmp_path: Path) -> None:
    file = tmp_path / "token.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 8)}}, file)
    with pytest.raises(CheckpointError, match="got an embedding"):
        read_it(file)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "txt", ""])
def test_suffixes_mean_nothing(suffix: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    safe, pickled, legacy = (tmp_path / f"{i}.{suffix}" for i in range(3))
    save_file(tensors, safe)
    torch.save(tensors, pickled)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    for file in (safe, pickled, legacy):
        assert torch.equal(read(stored([file]))["a"], tensors["a"])


def _lightning(patch: pytest.MonkeyPatch, name: str) -> Any:
    """A class that pickles as one of Lightning's, which isn't installed."""
    *modules, cls = name.split(".")
    for i in range(len(modules)):
        dotted = ".".join(modules[: i + 1])
        patch.setitem(sys.modules, dotted, types.ModuleType(dotted))
    made = type(cls, (), {"__module__": dotted})
    setattr(sys.modules[dotted], cls, made)
    return made


HARMLESS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "a callback's class as a key": lambda patch: {
        _lightning(patch, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"): {"a": 1}
    },
    "a callback": lambda patch: _lightning(patch, "lightning.pytorch.early_stopping.Early")(),
    "numpy": lambda _: [np.float64(0.5), np.float32(1), np.int64(3), np.arange(4), np.dtype("f4")],
    "a namespace": lambda _: argparse.Namespace(lr=1e-4, path=Path("x"), seen={1, 2}),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_training_scripts_leave_beside_the_weights(
    kind: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = HARMLESS[kind](monkeypatch)
    state = {"a": torch.arange(3.0)}
    file = tmp_path / "model.ckpt"
    whole = {"epoch": 3, "callbacks": beside, "state_dict": state}
    torch.save(whole, file, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    found = read(stored([file]))
    assert found.keys() == state.keys()
    assert torch.equal(found["a"], state["a"])


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_where_training_scripts_put_the_weights(name: str, tmp_path: Path) -> None:
    torch.save({name: {"a": torch.ones(1)}, "step": 3}, tmp_path / "x.ckpt")
    assert list(stored([tmp_path / "x.ckpt"])) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("other", [None, torch.float16, torch.bfloat16], ids=str)
def test_float8_becomes_a_dtype_that_layers_compute_in(
    dtype: torch.dtype, other: torch.dtype | None, tmp_path: Path
) -> None:
    small = torch.randn(50).to(dtype)
    tensors = {"a": small} | ({"b": torch.ones(1, dtype=other)} if other else {})
    save_file(tensors, tmp_path / "x.safetensors")
    found = read(stored([tmp_path / "x.safetensors"]))
    assert {value.dtype for value in found.values()} == {other or torch.float32}
    assert torch.equal(found["a"].float(), small.float())
    half = read(stored([tmp_path / "x.safetensors"]), torch.float16)["a"]
    assert torch.equal(half.float(), small.float())


def test_a_float8_unet(tmp_path: Path) -> None:
    UNet2DCondition(small_config()).save_pretrained(tmp_path)
    small = {n: v.to(torch.float8_e4m3fn) for n, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(small, tmp_path / WEIGHTS)
    for name, value in UNet2DCondition.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, small[name].float())
    save_file(small | {"conv_in.scale_weight": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="float8 with scales"):
        UNet2DCondition.from_pretrained(tmp_path)


def test_tensors_that_nothing_uses_are_left_out_with_one_warning(tmp_path: Path) -> None:
    model = UNet2DCondition(small_config())
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    extra = {"v_pred": torch.zeros(0), "ema.decay": torch.ones(1), "mid_block.note": torch.ones(1)}
    save_file(state | extra, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="3 tensors that nothing here uses: 'ema.decay'") as seen:
        again = UNet2DCondition.from_pretrained(tmp_path)
    assert len(seen) == 1
    assert all(torch.equal(v, state[n]) for n, v in again.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.resnets.7.conv1.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip.weight",
        "down_blocks.0.motion_modules.0.proj_in.weight",
        "time_embedding.cond_proj.weight",
        "encoder_hid_proj.weight",
        "conv_in.lora_A.weight",
    ],
)
def test_tensors_that_would_change_the_output_are_refused(name: str, tmp_path: Path) -> None:
    UNet2DCondition(small_config()).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | {name: torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"extra: {name}"):
        UNet2DCondition.from_pretrained(tmp_path)


def test_fields_that_a_trainer_adds_are_left_out_with_one_warning() -> None:
    values = small_config().to_dict() | {"decay": 0.999, "power": 0.75, "_note": 1}
    with pytest.warns(UserWarning, match="UNet2DConditionModel: .*'decay', 'power'") as caught:
        assert type(small_config()).from_dict(values) == small_config()
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["alone.safetensors", "alone.ckpt"])
def test_an_autoencoder_in_diffusers_names_without_a_config(name: str, tmp_path: Path) -> None:
    config = VAEConfig.preset("sd", block_out_channels=(32, 64), **_LEVELS)
    model = AutoencoderKL(config)
    model.save_pretrained(tmp_path / "vae")
    state = load_file(tmp_path / "vae" / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
        alone = AutoencoderKL.from_pretrained(tmp_path / name, scaling_factor=0.18215)
    assert alone.config == config
    assert all(torch.equal(v, state[n]) for n, v in alone.state_dict().items())
    with pytest.raises(CheckpointError, match="has no unet"):
        UNet2DCondition.from_pretrained(tmp_path / name)


_LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def test_both_names_are_one_autoencoder(tmp_path: Path) -> None:
    save_file(vae_states(VAES["sd1"], ""), tmp_path / "compvis.safetensors")
    first = as_vae(tmp_path / "compvis.safetensors")
    save_file(first.state_dict(), tmp_path / "diffusers.safetensors")
    second = as_vae(tmp_path / "diffusers.safetensors")
    assert second.config == first.config
    assert all(torch.equal(v, second.state_dict()[n]) for n, v in first.state_dict().items())
