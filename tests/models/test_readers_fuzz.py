"""Damaged files of every kind that is read: an error that names the file, or a right result."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutated, mutated_json, mutated_json_text, survives, write
from safetensors.torch import load as loads
from safetensors.torch import load_file, save, save_file
from small_unets import small_config
from torch import Tensor

from diffusion_fast.models import AutoencoderKL, CheckpointError, UNet2DCondition, VAEConfig
from diffusion_fast.models.checkpoints import CONFIG, INDEX, WEIGHTS
from diffusion_fast.models.lora_file import read_lora
from diffusion_fast.models.tensors import read, stored

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COUNT = 150  # mutated inputs of each kind
TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b.c": torch.ones(2, dtype=torch.float16)}
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LORA = {
    f"base_model.model.{QUERY}.lora_A.weight": torch.ones(2, 16),
    f"base_model.model.{QUERY}.lora_B.weight": torch.ones(16, 2),
    f"lora_unet_{QUERY.replace('.', '_').replace('to_q', 'to_k')}.lokr_w1": torch.ones(4, 4),
    f"lora_unet_{QUERY.replace('.', '_').replace('to_q', 'to_k')}.lokr_w2": torch.ones(4, 4),
}


def pickled(value: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


FILES: dict[str, bytes] = {
    "safetensors": save(TENSORS, {"format": "pt"}),
    "ckpt": pickled({"state_dict": TENSORS, "epoch": 3}),
    "legacy ckpt": pickled({"state_dict": TENSORS, "epoch": 3}, zipped=False),
    "embedding": pickled({"string_to_param": {"*": torch.ones(1, 8)}, "name": "x"}),
}


def check_right(found: Mapping[str, Tensor] | None, data: bytes, seed: int) -> None:
    """What was read is what safetensors or torch read in these bytes; None is a refusal."""
    if found is None:
        return
    if data[8:9] == b"{":
        truth = loads(data)
    else:
        truth = torch.load(io.BytesIO(data), weights_only=True)
        for name in ("state_dict", "model", "module"):
            truth = truth[name] if isinstance(truth.get(name), dict) else truth
    assert found.keys() <= truth.keys(), seed
    for name, value in found.items():
        wanted = truth[name].to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True, msg=str(seed))


@pytest.mark.parametrize("kind", FILES)
def test_files_of_tensors(kind: str, tmp_path: Path) -> None:
    for seed in range(COUNT):
        data = mutated(FILES[kind], seed)
        file = write(tmp_path / f"{seed}.bin", data)
        found = survives(lambda file=file: read(stored([file])), (CheckpointError,), [file], seed)
        check_right(found, data, seed)
        file.unlink()


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_loras(kind: str, tmp_path: Path) -> None:
    unet = {"unet": UNet2DCondition(small_config(cross_attention_dim=32))}
    data = save(LORA) if kind == "safetensors" else pickled(LORA)
    settings = json.dumps({"lora_alpha": 4, "r": 2, "alpha_pattern": {"to_q": 3}, "bias": "none"})
    for seed in range(COUNT):
        folder = tmp_path / str(seed)
        folder.mkdir()
        damage = seed % 3  # of the settings, of the tensors, or of their names
        name = folder / "adapter_model.safetensors"
        if damage == 2 and kind == "safetensors":
            renamed = mutated_json(dict.fromkeys(LORA, 0), seed)
            names = map(str, renamed if isinstance(renamed, (dict, list)) else LORA)
            write(name, save(dict(zip(names, map(torch.clone, LORA.values()), strict=False))))
        else:
            write(name, mutated(data, seed) if damage else data)
        text = settings.encode() if damage else mutated_json_text(settings, seed)
        write(folder / "adapter_config.json", text)
        survives(lambda f=folder: read_lora(f, unet), (CheckpointError,), [folder], seed)


def saved(kind: str, folder: Path) -> tuple[Path, Callable[[], Any]]:
    if kind == "unet":
        UNet2DCondition(small_config()).save_pretrained(folder)
        return folder, lambda: UNet2DCondition.from_pretrained(folder)
    small = VAEConfig(block_out_channels=(4,), norm_num_groups=4)
    AutoencoderKL(small).save_pretrained(folder)
    return folder, lambda: AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["unet", "vae"])
@pytest.mark.parametrize("part", [CONFIG, INDEX, WEIGHTS])
def test_folders(kind: str, part: str, tmp_path: Path) -> None:
    folder, load = saved(kind, tmp_path / "model")
    if part == INDEX:
        names = dict.fromkeys(load_file(folder / WEIGHTS), "part.safetensors")
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    data = (folder / part).read_bytes()
    for seed in range(COUNT // 2):
        edited = mutated(data, seed) if part == WEIGHTS else mutated_json_text(data.decode(), seed)
        write(folder / part, edited)
        survives(load, (CheckpointError,), [folder], seed)


def test_headers(tmp_path: Path) -> None:
    """Damage of a safetensors header's JSON, with a length that fits."""
    data = save(TENSORS)
    size = int.from_bytes(data[:8], "little")
    for seed in range(COUNT):
        header = mutated_json_text(data[8 : 8 + size].decode(), seed)
        edited = len(header).to_bytes(8, "little") + header + data[8 + size :]
        file = write(tmp_path / f"{seed}.safetensors", edited)
        found = survives(lambda file=file: read(stored([file])), (CheckpointError,), [file], seed)
        check_right(found, edited, seed)


def test_the_undamaged_files_are_read(tmp_path: Path) -> None:
    for kind, data in FILES.items():
        if kind != "embedding":
            found = read(stored([write(tmp_path / "x", data)]))
            assert all(torch.equal(value, TENSORS[name]) for name, value in found.items())
    unet = {"unet": UNet2DCondition(small_config(cross_attention_dim=32))}
    save_file(LORA, tmp_path / "lora.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_lora(tmp_path / "lora.safetensors", unet)["unet"]) == 2
