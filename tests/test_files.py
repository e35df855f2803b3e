"""Files: whole or not there, text as it is, tensors that share memory, errors with names."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_fast.files import (
    CheckpointError,
    read_json,
    read_lines,
    read_tensors,
    save_tensors,
    visible_files,
    whole,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_take_their_names_together(tmp_path: Path) -> None:
    first, second = tmp_path / "deep" / "a", tmp_path / "b"
    with whole(first, second) as (one, two):
        one.write_text("1")
        two.write_text("2")
        assert not first.exists()
        assert not second.exists()
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert names(tmp_path) == ["b", "deep"]
    assert stat.S_IMODE(second.stat().st_mode) == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("stop")])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with whole(path, tmp_path / "b") as (one, _):
            one.write_text("new")
            raise error

    if isinstance(error, OSError):
        with pytest.raises(OSError, match=r"/a, .*/b: can't be written: .*No space left"):
            fail()
    else:
        with pytest.raises(RuntimeError, match="stop"):
            fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


TEXT = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_lines_end_at_newlines_alone(lines: list[str], end: str, mark: bool) -> None:
    lines[0] = lines[0].removeprefix("\ufeff")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes((("\ufeff" if mark else "") + end.join(lines)).encode())
        assert read_lines(path) == lines


def test_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes("café".encode(encoding))
        with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text"):
            read_lines(path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"b": [1, 2.5], "a": "é"}, path)
    assert read_json(path) == {"a": "é", "b": [1, 2.5]}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_json(path)["a"] == "é"
    for text in (b"{", b"[" * 100_000, b"\xff{}"):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"a\.json: can't be read as JSON"):
            read_json(path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"a\.json: expected a JSON object, got list"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"none\.json: can't be read"):
        read_json(tmp_path / "none.json")


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    table = torch.arange(12.0)
    tensors = {
        "part": table[2:7],
        "table": table,
        "view": table.view(3, 4),
        "turned": table.view(3, 4).t(),
        "expanded": torch.ones(1).expand(5),
        "number": table[3],
        "empty": table[:0],
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: can't be read, damaged"):
        read_tensors(tmp_path / "a.safetensors")


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "data"  # the folder itself may be hidden
    wanted = ["a.png", "b/c.PNG", "b/d.e/f.png"]
    other = [".a.png", "._a.png", ".ipynb_checkpoints/a.png", "b/.git/a.png", "__MACOSX/a.png"]
    for name in [*wanted, *other, "a.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "folder.png").mkdir()
    assert visible_files(root, (".png",)) == [root / name for name in wanted]
