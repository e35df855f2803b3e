"""Checkpoints on the disk: complete or absent, whatever happens while one is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_fast import files
from diffusion_fast.files import CheckpointError
from diffusion_fast.training import Checkpoints, checkpoint
from diffusion_fast.training.checkpoint import MARK, check_finite, read_checkpoint

GROUPS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "random": {"s": torch.tensor([1, 2])}}


def save(folder: Path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, GROUPS, {"step": step})
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7).newest()
    assert path == tmp_path / "step_00000007"
    groups, state = read_checkpoint(path)
    assert state == {"step": 7}
    assert groups.keys() == GROUPS.keys()
    assert torch.equal(groups["model"]["w"], GROUPS["model"]["w"])
    assert torch.equal(groups["random"]["s"], GROUPS["random"]["s"])
    assert groups["random"]["s"].dtype == torch.int64
    assert names(path) == [MARK, "model.safetensors", "random.safetensors", "state.json"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    assert checkpoints.best() is None
    for step, loss in ((1, 0.5), (2, 0.2), (3, 0.4), (4, None), (5, 0.3)):
        checkpoints.save(step, GROUPS, {}, loss)
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]
    assert checkpoints.best() == checkpoints.path(2)
    assert checkpoints.newest() == checkpoints.path(5)
    checkpoints.save(6, GROUPS, {}, 0.1)
    assert names(tmp_path) == ["step_00000005", "step_00000006"]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, loss in enumerate((float("nan"), float("inf"), 0.5, float("nan"), 0.7), 1):
        checkpoints.save(step, GROUPS, {}, loss)
    assert checkpoints.best() == checkpoints.path(3)
    only = Checkpoints(tmp_path / "other")
    only.save(1, GROUPS, {}, float("nan"))
    assert only.best() is None


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 7)
    with pytest.raises(FileExistsError, match="step_00000007: there is a checkpoint"):
        checkpoints.save(7, GROUPS, {"other": 1})
    assert read_checkpoint(checkpoints.path(7))[1] == {"step": 7}


def test_what_was_left_unfinished_is_not_read_and_goes_away(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1)
    shutil.copytree(checkpoints.path(1), checkpoints.path(2))
    (checkpoints.path(2) / MARK).unlink()
    (tmp_path / ".step_00000003.tmp").mkdir()
    assert checkpoints.newest() == checkpoints.path(1)
    with pytest.raises(CheckpointError, match=r"step_00000002: expected .* unfinished, it has no"):
        read_checkpoint(checkpoints.path(2))
    checkpoints.save(4, GROUPS, {})
    assert names(tmp_path) == ["step_00000001", "step_00000004"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 1).path(1)
    file = path / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{name}: expected .* bytes, .*{damage}"):
        read_checkpoint(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_byte_is_named(saved: Path, data: st.DataObject) -> None:
    """Any byte of any file, the mark's own included, changed to any other."""
    file = data.draw(st.sampled_from(sorted(saved.iterdir())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    changed = data.draw(st.integers(0, 255).filter(lambda byte: byte != before[place]))
    file.write_bytes(before[:place] + bytes([changed]) + before[place + 1 :])
    try:
        refused = refusal(saved)
    finally:
        file.write_bytes(before)
    # White space between the values of the mark alone changes nothing.
    assert file.name in refused or (file.name == MARK and not refused)


def refusal(path: Path) -> str:
    """What reading a checkpoint says; nothing if it is the one that was saved."""
    try:
        groups, state = read_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    assert state == {"step": 1}
    assert all(torch.equal(groups[g][name], v) for g in GROUPS for name, v in GROUPS[g].items())
    return ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), 1).path(1)


def test_a_damaged_mark_does_not_stop_the_next_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, loss in ((1, 0.1), (2, 0.5)):
        checkpoints.save(step, GROUPS, {}, loss)
    mark = checkpoints.path(1) / MARK
    mark.write_text(mark.read_text().replace("0.1", "0.2"))
    checkpoints.save(3, GROUPS, {}, 0.6)
    assert checkpoints.best() == checkpoints.path(2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    """Its mark holds sizes, but no checksums."""
    path = save(tmp_path, 1).path(1)
    mark = json.loads((path / MARK).read_text())
    old = {"files": mark["files"], "validation_loss": None}
    (path / MARK).write_text(json.dumps(old, indent=2) + "\n")
    assert read_checkpoint(path)[1] == {"step": 1}


def test_complex_numbers_are_kept(tmp_path: Path) -> None:
    values = {str(d): torch.randn(3).to(d) * 1j for d in (torch.complex64, torch.complex128)}
    path = Checkpoints(tmp_path).save(1, {"model": values}, {})
    found = read_checkpoint(path)[0]["model"]
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: expected a checkpoint, .* no such folder"):
        read_checkpoint(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The kernel's own refusal to write further, in the middle of the tensors."""
    checkpoints = save(tmp_path, 1)
    large = {"model": {"w": torch.zeros(200_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="step_00000002: can't be written"):
            checkpoints.save(2, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step_00000001"]
    assert read_checkpoint(checkpoints.path(1))[1] == {"step": 1}
    checkpoints.save(2, large, {})


@pytest.mark.parametrize("function", ["_write", "_write_mark", "flush", "write_json"])
def test_no_space_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    checkpoints = save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, function, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, GROUPS, {})
    assert names(tmp_path) == ["step_00000001"]


def test_the_order_in_which_things_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file before the rename, the rename before the mark, the mark before its name."""
    done: list[str] = []
    flush, rename, replace = files.flush, os.rename, os.replace
    target = tmp_path / "step_00000001"

    def note(verb: str, path: Path) -> None:
        name = Path(path).relative_to(tmp_path.parent).name
        done.append(f"{verb} {name.replace(f'.{os.getpid()}', '')}")

    for module in (files, checkpoint):
        monkeypatch.setattr(module, "flush", lambda p: (note("flush", p), flush(p)))
    monkeypatch.setattr(os, "rename", lambda a, b: (note("rename", b), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (note("mark", b), replace(a, b)))
    Checkpoints(tmp_path).save(1, GROUPS, {})
    assert done == [
        *(f"flush {name}" for name in ("model.safetensors", "random.safetensors", "state.json")),
        "flush .step_00000001.tmp",
        "rename step_00000001",
        f"flush {tmp_path.name}",
        f"flush .{MARK}.tmp",
        f"mark {MARK}",
        "flush step_00000001",
    ]
    sizes = json.loads((target / MARK).read_text())["files"]
    assert sizes == {name: (target / name).stat().st_size for name in sizes}


def test_broken_weights_are_refused() -> None:
    check_finite({"model": {"w": torch.full((3,), 3e38), "n": torch.ones((), dtype=torch.int64)}})
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(FloatingPointError, match=r"model: expected finite numbers, .* in w"):
            check_finite({"model": {"w": torch.tensor([1.0, value])}})
    with pytest.raises(FloatingPointError, match="in w"):
        check_finite({"model": {"w": torch.tensor([float("inf"), -float("inf")])}})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="every: expected a positive integer"):
        Checkpoints("x", every=0)
    with pytest.raises(ValueError, match="keep: expected a positive integer"):
        Checkpoints("x", keep=0)
