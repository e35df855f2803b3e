"""Files: written whole or not at all, JSON, text and tensors; every error names its file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

AnyPath = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A file is missing, damaged, or belongs to another model; the message names it."""


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole(*paths: AnyPath) -> Iterator[list[Path]]:
    """Temporary files beside ``paths``, which take these names when all of them are on the disk.

    Raises:
        OSError: something can't be written; what was there before still is.
    """
    targets = [Path(path) for path in paths]
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in targets]
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in temporary:
            flush(path)
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
        for folder in {target.parent for target in targets}:
            flush(folder)
    except (SafetensorError, OSError) as error:  # the first is its way to say that the disk is full
        names = ", ".join(map(str, targets))
        raise OSError(f"{names}: can't be written: {error}") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: AnyPath) -> Iterator[Path]:
    """A folder to write files to, which move to ``folder`` when all of them are on the disk.

    Raises:
        OSError: something can't be written; ``folder`` is as it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        paths = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in paths:
            flush(path)
        for path in paths:
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except (SafetensorError, OSError) as error:  # the first as above
        raise OSError(f"{folder}: can't be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def visible_files(folder: AnyPath, suffixes: Sequence[str]) -> list[Path]:
    """Files below a folder with one of the suffixes, sorted.

    Hidden files and folders are left out, and so are those that other programs leave beside data.
    Links to folders are followed; a folder that is reached twice is read once.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # by a link
            folders.clear()
            continue
        seen.add(real)
        inner = [Path(root, name) for name in sorted(folders) if is_visible(name)]
        folders[:] = [one.name for one in sorted(inner, key=Path.is_symlink)]  # links come last
        found += [Path(root, name) for name in names if is_visible(name)]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def is_visible(name: str) -> bool:
    """Whether a name in a folder is one that its user put there."""
    return not name.startswith(".") and name not in ("__MACOSX", "@eaDir")


def read_text(path: AnyPath) -> str:
    """The text of a UTF-8 file as it is, without a byte order mark.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def read_lines(path: AnyPath) -> list[str]:
    r"""The lines of a UTF-8 file. They end at ``\n`` or ``\r\n`` alone: others are text.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8.
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it can't be read, or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON file's text, the same for equal values."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(value: Mapping[str, Any], path: AnyPath) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    with whole(path) as (temporary,):
        temporary.write_text(json_text(value), encoding="utf-8")


def checksum(parts: Iterable[Any]) -> str:
    """CRC-32 of bytes, or buffers of them, as if in a row; 8 hexadecimal digits."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def read_tensors(path: AnyPath) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read, damaged: {error}") from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str] | None = None
) -> None:
    """Fill a safetensors file. Tensors that share memory, which it refuses, are copied.

    Args:
        tensors: what to write.
        path: the file.
        metadata: texts for its header, beside the format.

    Raises:
        SafetensorError: the disk is full.
    """
    own, places = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        alone = storage.nbytes() == value.nbytes and storage.data_ptr() not in places
        places.add(storage.data_ptr())
        own[name] = value if alone else value.clone()
    save_file(own, path, metadata={"format": "pt", **(metadata or {})})
