"""Files that lie about themselves are refused by name, and nothing is loaded of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_unets import small_config

from diffusion_fast.models import CheckpointError, UNet2DCondition
from diffusion_fast.models.checkpoints import CONFIG, INDEX, WEIGHTS
from diffusion_fast.models.tensors import fill, read, stored

Header = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    UNet2DCondition(small_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "unet")


def rewrite(file: Path, change: Callable[[Header], Header], length: int | None = None) -> None:
    """Change a file's header, and the header's stated length."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    stated = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", stated) + text + data[8 + size :])


def refused(path: Path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        UNet2DCondition.from_pretrained(path)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(length: int, folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda header: header, length)
    assert str(folder / WEIGHTS) in refused(folder, "truncated, or not a safetensors file")


def _overlap(header: Header) -> Header:
    header["conv_out.bias"]["data_offsets"] = header["conv_norm_out.bias"]["data_offsets"]
    return header


def _beyond(header: Header) -> Header:
    header["conv_out.bias"]["data_offsets"] = [2**50, 2**50 + 16]
    return header


def _backwards(header: Header) -> Header:
    header["conv_out.bias"]["data_offsets"] = header["conv_out.bias"]["data_offsets"][::-1]
    return header


def _shape(*shape: int) -> Callable[[Header], Header]:
    def change(header: Header) -> Header:
        header["conv_out.bias"]["shape"] = list(shape)
        return header

    return change


def _dtype(header: Header) -> Header:
    header["conv_out.bias"]["dtype"] = "F3"
    return header


@pytest.mark.parametrize(
    "change",
    [
        _overlap,
        _beyond,
        _backwards,
        _dtype,
        _shape(2**63, 2**63),
        _shape(2**40),
        _shape(-4),
        lambda header: {"a": [[]] * 3},
        lambda header: [],
    ],
    ids=["overlap", "beyond", "backwards", "dtype", "overflow", "large", "negative", "a", "list"],
)
def test_headers_that_contradict_the_file(change: Callable[[Header], Header], folder: Path) -> None:
    rewrite(folder / WEIGHTS, change)
    assert str(folder / WEIGHTS) in refused(folder, "truncated, or not a safetensors file")


@pytest.mark.parametrize("shape", [(0,), (2**62, 0), (4, 1), (1,) * 70])
def test_shapes_that_are_absurd_but_valid(shape: tuple[int, ...], folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file(state | {"conv_out.bias": torch.zeros(shape)}, folder / WEIGHTS)
    refused(folder, r"misshapen: conv_out\.bias expected \[4\], got \[")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/tmp/x", "", "a\x00b", "__class__"])
def test_names_mean_nothing_but_themselves(name: str, folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file(state | {name: torch.zeros(1)}, folder / WEIGHTS)
    before = sorted(os.listdir(folder))
    with pytest.warns(UserWarning, match="one tensor that nothing here uses: ") as caught:
        UNet2DCondition.from_pretrained(folder)
    assert repr(name) in str(caught[0].message)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/passwd", "a/../../w.safetensors", "..", ".", ""]
)
def test_an_index_that_leads_elsewhere(name: str, folder: Path) -> None:
    (folder.parent / "w.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    refused(folder, "plain file names|missing, but listed in")


def test_json_of_a_million_brackets(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 1_000_000)
    assert str(folder / CONFIG) in refused(folder, "can't be read as JSON")


@pytest.mark.parametrize("width", [2**40, 2**62])
def test_a_config_of_impossible_size(width: int, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"cross_attention_dim": width}))
    refused(folder, "can't be built from its config|misshapen: ")


def test_nothing_is_half_loaded(folder: Path) -> None:
    """The model stays on the meta device, with its own parameters."""
    state = load_file(folder / WEIGHTS)
    del state["conv_in.weight"]
    save_file(state, folder / WEIGHTS)
    with torch.device("meta"):
        model = UNet2DCondition(small_config())
    before = list(model.parameters())
    with pytest.raises(CheckpointError, match=r"missing: conv_in\.weight"):
        fill(model, stored([folder / WEIGHTS]), folder / WEIGHTS)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HOSTILE"],)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused(
    zipped: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = folder / "ran"
    monkeypatch.setenv("HOSTILE", str(ran))
    file = folder / "model.ckpt"
    torch.save({"state_dict": {}, "x": Hostile()}, file, _use_new_zipfile_serialization=zipped)
    message = refused(file, "refused, this pickle is damaged or holds more than tensors")
    assert str(file) in message
    assert "safetensors" in message
    assert not ran.exists()
    torch.load(file, weights_only=False)  # it would have
    assert ran.exists()


def _truncated(file: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:700])


def _zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "nothing")


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"not a pickle at all"),
        lambda file: file.write_bytes(pickle.dumps([1, 2])),
        lambda file: torch.save([torch.zeros(1)], file),
        lambda file: torch.save({"state_dict": 3}, file),
        _truncated,
        _zip,
    ],
    ids=["empty", "text", "pickle", "list", "number", "truncated", "zip"],
)
def test_a_pickle_that_is_no_checkpoint(write: Callable[[Path], Any], tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    write(file)
    assert str(file) in refused(file, "refused, this|truncated, or not|expected a dict")


def test_a_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, f"expected {WEIGHTS}")


def test_a_file_that_vanishes_between_header_and_tensors(folder: Path) -> None:
    tensors = stored([folder / WEIGHTS])
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read(tensors)
