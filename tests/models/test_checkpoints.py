"""U-Nets travel to diffusers and back; a bad folder is refused and a failed save leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_unets import TEXT_TIME, small_config
from unet_parity import ask_diffusers, inputs, twins

from diffusion_fast.files import write_json
from diffusion_fast.models import CheckpointError, UNet2DCondition
from diffusion_fast.models.checkpoints import CONFIG, INDEX, WEIGHTS

load = UNet2DCondition.from_pretrained


def _same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    expected = second.state_dict()
    assert first.state_dict().keys() == expected.keys()
    for name, value in first.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[UNet2DCondition, Path]:
    """A small model and the folder that it was saved to."""
    model, _ = twins(small_config())
    model.save_pretrained(tmp_path / "unet")
    return model, tmp_path / "unet"


@pytest.mark.parametrize("changes", [{}, TEXT_TIME], ids=["text", "text_time"])
@pytest.mark.parametrize("shard_size", ["10GB", "200KB"])
def test_loads_what_diffusers_saved(
    changes: dict[str, Any], shard_size: str, tmp_path: Path
) -> None:
    config = small_config(**changes)
    _, theirs = twins(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "200KB")
    ours = load(tmp_path)
    assert ours.config == config
    assert not ours.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in ours.parameters())
    _same_weights(ours, theirs)
    arguments = inputs(config)
    assert torch.allclose(ours(**arguments), ask_diffusers(theirs, arguments), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, TEXT_TIME], ids=["text", "text_time"])
def test_diffusers_loads_what_we_saved(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, _ = twins(small_config(**changes))
    ours.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "new" / "folder")
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(report.values())
    _same_weights(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_our_own_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = UNet2DCondition(small_config(num_classes=3)).to(dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    _same_weights(again, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_takes_a_pipeline_folder_a_file_or_the_config(saved: tuple[UNet2DCondition, Path]) -> None:
    model, folder = saved
    half = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    _same_weights(load(folder.parent), model)
    _same_weights(load(str(folder / WEIGHTS)), model)
    _same_weights(load(folder / CONFIG), model)
    _same_weights(load(folder / "diffusion_pytorch_model.fp16.safetensors"), model.half())


@pytest.mark.parametrize("size", ["10GB", "200KB"], ids=["whole", "sharded"])
def test_variants(size: str, tmp_path: Path) -> None:
    """What diffusers saves as a variant is loaded if it is asked for, and named if it isn't."""
    _, theirs = twins(small_config())
    theirs.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    _same_weights(load(tmp_path, variant="fp16"), theirs)
    with pytest.raises(CheckpointError, match=r"; pass variant='fp16'$"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected diffusion_pytorch_model\.bf16\.safe"):
        load(tmp_path, variant="bf16")
    theirs.float().save_pretrained(tmp_path / "full", max_shard_size=size)
    shutil.copytree(tmp_path / "full", tmp_path, dirs_exist_ok=True)
    _same_weights(load(tmp_path), theirs)
    _same_weights(load(tmp_path, variant="fp16"), theirs.half())
    _same_weights(load(tmp_path, variant="fp16", dtype=torch.float32), theirs.float())


def test_the_older_names_of_sharded_variants(tmp_path: Path) -> None:
    """An index names its files itself, wherever the variant stands in their names."""
    model, _ = twins(small_config())
    model.save_pretrained(tmp_path)
    part = "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"
    (tmp_path / WEIGHTS).rename(tmp_path / part)
    index = {"weight_map": dict.fromkeys(model.state_dict(), part)}
    write_json(index, tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json")
    _same_weights(load(tmp_path, variant="fp16"), model)


def test_a_variant_of_a_file_is_refused(saved: tuple[UNet2DCondition, Path]) -> None:
    with pytest.raises(CheckpointError, match="variant: expected None for a file, got 'fp16'"):
        load(saved[1] / WEIGHTS, variant="fp16")


@pytest.mark.parametrize("size", ["10GB", "200KB"], ids=["whole", "sharded"])
def test_pickled_weights_of_a_folder(size: str, tmp_path: Path) -> None:
    _, theirs = twins(small_config())
    theirs.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=size)
    assert not list(tmp_path.glob("*.safetensors"))
    _same_weights(load(tmp_path), theirs)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1, 1)], ids=str)
def test_a_matrix_may_be_a_convolution(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Projections [C, C] and [C, C, 1, 1] are the same numbers."""
    model, _ = twins(small_config())
    model.save_pretrained(tmp_path)
    name = "mid_block.attentions.0.proj_in.weight"
    expected = model.state_dict()[name]
    assert expected.shape == (32, 32, 1, 1)
    state = {n: v.clone() for n, v in load_file(tmp_path / WEIGHTS).items()}
    state[name] = expected.reshape(shape).clone()
    save_file(state, tmp_path / WEIGHTS)
    _same_weights(load(tmp_path), model)
    save_file(state | {name: torch.zeros(32, 32, 1, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"misshapen: {name}"):
        load(tmp_path)


def test_converts_to_a_dtype(saved: tuple[UNet2DCondition, Path]) -> None:
    model, folder = saved
    _same_weights(load(folder, dtype=torch.bfloat16), model.bfloat16())


def test_training_a_loaded_model_leaves_its_file_alone(saved: tuple[UNet2DCondition, Path]) -> None:
    _, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / WEIGHTS).read_bytes() == before
    model.save_pretrained(folder)  # over the file that it is mapped from
    _same_weights(load(folder), model)


def test_saving_over_a_sharded_model_replaces_it(tmp_path: Path) -> None:
    ours, theirs = twins(small_config())
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    with torch.no_grad():
        ours.conv_in.weight.add_(1)
    ours.save_pretrained(tmp_path)
    _same_weights(load(tmp_path), ours)
    _same_weights(diffusers.UNet2DConditionModel.from_pretrained(tmp_path), ours)


def test_loading_needs_no_second_copy(tmp_path: Path) -> None:
    """Parameters are the file's own pages until they are written to."""
    model = UNet2DCondition(small_config(block_out_channels=(256, 512)))
    model.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    del model

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
        return int(status.split()[0]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    before = anonymous()
    loaded = load(tmp_path)
    assert size > 100 * 2**20
    assert anonymous() - before < 0.2 * size
    assert sum(p.numel() * 4 for p in loaded.parameters()) <= size


def _rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors in a saved model; None removes one."""
    state: dict[str, Any] = {name: v.clone() for name, v in load_file(folder / WEIGHTS).items()}
    state.update({name.replace("__", "."): value for name, value in changes.items()})
    save_file({name: v for name, v in state.items() if v is not None}, folder / WEIGHTS)


def test_wrong_tensors_are_listed(saved: tuple[UNet2DCondition, Path]) -> None:
    _, folder = saved
    _rewrite(
        folder,
        conv_in__weight=None,
        conv_out__bias=torch.zeros(5),
        lora__up=torch.zeros(2, 3),
    )
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder / WEIGHTS}: not this model's weights, 3 of its tensors:\n"
        "  extra: lora.up [2, 3]\n"
        "  misshapen: conv_out.bias expected [4], got [5]\n"
        "  missing: conv_in.weight [16, 4, 3, 3]"
    )


def test_a_dtype_of_its_own_is_named(saved: tuple[UNet2DCondition, Path]) -> None:
    model, folder = saved
    _rewrite(folder, conv_out__bias=model.conv_out.bias.detach().half())
    with pytest.raises(CheckpointError, match=r"got torch\.float16, torch\.float32; pass dtype="):
        load(folder)
    assert load(folder, dtype=torch.float32).conv_out.bias.dtype == torch.float32
    _rewrite(folder, **{name: value.int() for name, value in load_file(folder / WEIGHTS).items()})
    with pytest.raises(CheckpointError, match=r"expected one floating dtype, got torch\.int32"):
        load(folder)


@pytest.mark.parametrize("length", [0, 4, 1000, -1], ids=["empty", "size", "header", "tensors"])
def test_a_truncated_file_is_refused(length: int, saved: tuple[UNet2DCondition, Path]) -> None:
    _, folder = saved
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file") as caught:
        load(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_a_pickle_of_another_name_is_read_as_one(saved: tuple[UNet2DCondition, Path]) -> None:
    model, folder = saved
    torch.save(model.state_dict(), folder / WEIGHTS)
    _same_weights(load(folder), model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"_class_name": "AutoencoderKL"}', "_class_name: expected UNet2DConditionModel"),
        ('{"class_embed_type": "timestep"}', "class_embed_type: 'timestep' is not supported"),
        ('{"layers_per_block": 3}', "missing: "),
    ],
)
def test_a_bad_config_is_refused(
    text: str, message: str, saved: tuple[UNet2DCondition, Path]
) -> None:
    _, folder = saved
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"not a diffusers model, there is no config\.json"):
        load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(small_config().to_dict()))
    with pytest.raises(CheckpointError, match=f"expected {WEIGHTS} .*, found {CONFIG}"):
        load(tmp_path)
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "expected a weight_map"),
        ({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}, "plain file names"),
        ({"weight_map": {"conv_in.weight": "part.safetensors"}}, "missing, but listed in"),
    ],
)
def test_a_bad_index_is_refused(
    index: dict[str, Any], message: str, saved: tuple[UNet2DCondition, Path]
) -> None:
    _, folder = saved
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_tensor_in_two_parts_is_refused(saved: tuple[UNet2DCondition, Path]) -> None:
    model, folder = saved
    names = list(model.state_dict())
    save_file(load_file(folder / WEIGHTS), folder / "a.safetensors")
    save_file({names[0]: torch.zeros(1)}, folder / "b.safetensors")
    parts = dict.fromkeys(names[1:], "a.safetensors") | {names[0]: "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(CheckpointError, match=f"repeated: {names[0]}"):
        load(folder)


def _unchanged_after_a_failed_save(model: UNet2DCondition, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = UNet2DCondition(model.config)
    with pytest.raises(OSError, match=r"File too large|No space left"):
        changed.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    _same_weights(load(folder), model)


def test_a_write_that_fails_leaves_what_was_there(saved: tuple[UNet2DCondition, Path]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        _unchanged_after_a_failed_save(*saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_at_the_last_moment_leaves_what_was_there(
    saved: tuple[UNet2DCondition, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    _unchanged_after_a_failed_save(*saved)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        UNet2DCondition(small_config()).save_pretrained(tmp_path / "file")


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "config.json"
    write_json({"b": 1, "a": [2]}, path)
    before = path.read_text()
    assert json.loads(before) == {"a": [2], "b": 1}

    def full(self: Path, text: str, **_: object) -> None:
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_json({}, path)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]
