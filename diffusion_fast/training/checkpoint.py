"""Checkpoints on the disk: whole or not there at all.

A checkpoint is a folder ``step_00001000`` of safetensors files and one ``state.json``. It is
written under another name, brought onto the disk, renamed, and only then gets its mark
``complete.json``, which lists its files, their sizes and checksums (CRC-32). A folder without a
mark is what an interruption left and is never read; one with a mark whose files are not what it
lists is damaged and named.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import (
    AnyPath,
    CheckpointError,
    checksum,
    flush,
    json_text,
    read_json,
    read_tensors,
    save_tensors,
    write_json,
)
from ..ops import checks

MARK = "complete.json"
STATE = "state.json"
_COMPLEX = "#complex"  # behind the name of a tensor kept as pairs of real numbers
_CHUNK = 2**20  # bytes
_SHOWN = 8  # tensors in an error message

Groups = Mapping[str, Mapping[str, Tensor]]  # one safetensors file each


@dataclass(frozen=True)
class Checkpoints:
    """The folder of a run's checkpoints.

    Args:
        folder: folder of the checkpoints of this run alone.
        every: steps between two checkpoints.
        keep: how many of the newest to keep; the one with the lowest validation loss is kept too.
    """

    folder: AnyPath
    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        checks.positive_int("every", self.every)
        checks.positive_int("keep", self.keep)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return Path(self.folder) / f"step_{step:08d}"

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(mark.parent for mark in Path(self.folder).glob(f"step_*/{MARK}"))

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        return max(self.all(), default=None)

    def best(self) -> Path | None:
        """The one with the lowest validation loss, None if there was no validation."""
        known: dict[Path, float] = {}
        for path in self.all():
            with contextlib.suppress(CheckpointError):  # damaged, which resuming it names
                loss = _read_mark(path).get("validation_loss")
                if isinstance(loss, (int, float)) and not math.isnan(loss):
                    known[path] = loss
        return min(known, key=lambda path: known[path], default=None)

    def save(
        self,
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            step: number of the step, which names the checkpoint.
            groups: tensors by name, one file for each group.
            state: anything else, as JSON can hold it.
            validation_loss: decides which one is the best.

        Returns:
            Its folder.

        Raises:
            FileExistsError: there is a complete one of this step.
            OSError: the folder can't be written, for example because the disk is full. No part of
                the new checkpoint is left then, and all older ones are as they were.
        """
        target = self.path(step)
        if (target / MARK).exists():
            raise FileExistsError(f"{target}: there is a checkpoint of this step already")
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            temporary.mkdir()
            mark = _write(temporary, groups, state)
            os.rename(temporary, target)
            flush(target.parent)
            _write_mark(target, {**mark, "validation_loss": validation_loss})
        except (SafetensorError, OSError) as error:
            raise OSError(f"{target}: can't be written: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if not (target / MARK).exists():
                shutil.rmtree(target, ignore_errors=True)
        self._prune()
        return target

    def _prune(self) -> None:
        best = self.best()
        for path in self.all()[: -self.keep]:
            if path != best:
                (path / MARK).unlink()  # first: half a checkpoint must not look like one
                shutil.rmtree(path)

    def _remove_unfinished(self) -> None:
        """What a run that was killed has left."""
        for path in Path(self.folder).glob(".step_*.tmp"):
            shutil.rmtree(path)
        for path in Path(self.folder).glob("step_*"):
            if path.is_dir() and not (path / MARK).exists():
                shutil.rmtree(path)


def read_checkpoint(path: AnyPath) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the state that :meth:`Checkpoints.save` was given.

    Raises:
        CheckpointError: the folder is missing, unfinished or damaged; names the file.
    """
    path = Path(path)
    if not (path / MARK).is_file():
        what = f"unfinished, it has no {MARK}" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: expected a checkpoint, but it is {what}")
    mark = _read_mark(path)
    checksums = mark.get("checksums", {})  # older ones have none
    for name, size in mark["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            got = "it is missing" if found is None else f"got {found}: the file is cut short"
            raise CheckpointError(f"{file}: expected {size} bytes, {got}")
        if name in checksums and _checksum(file) != checksums[name]:
            raise CheckpointError(f"{file}: damaged, its checksum is not {checksums[name]}")
    groups = {
        name.removesuffix(".safetensors"): {
            key.removesuffix(_COMPLEX): torch.view_as_complex(v) if key.endswith(_COMPLEX) else v
            for key, v in read_tensors(path / name).items()
        }
        for name in mark["files"]
        if name != STATE
    }
    return groups, read_json(path / STATE)


def compare_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str], origin: str
) -> None:
    """Refuse to go on with another configuration.

    Raises:
        ValueError: lists everything that differs.
    """
    before, now = _flat(before), _flat(now)
    for name in ignore:
        checks.one_of("ignore", name, sorted(before.keys() | now.keys()))
    differing = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in ignore
    ]
    if differing:
        got = "; ".join(differing)
        raise ValueError(f"resume: expected the settings of {origin}, got others: {got}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            out[name] = value
    return out


def compare_tensors(
    group: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str
) -> None:
    problems = [f"missing: {name}" for name in expected.keys() - found.keys()]
    problems += [f"extra: {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"misshapen: {name} expected {list(value.shape)}, got {list(found[name].shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        shown, more = sorted(problems)[:_SHOWN], len(problems) - _SHOWN
        lines = "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])
        raise CheckpointError(f"{origin}: not the tensors of this {group}: {lines}")


def check_finite(groups: Groups) -> None:
    """Refuse to save weights that training has broken.

    Raises:
        FloatingPointError: a tensor holds NaN or an infinity; names it.
    """
    for group, tensors in groups.items():
        for name, value in tensors.items():
            if not value.isfinite().all():
                raise FloatingPointError(f"{group}: expected finite numbers, got others in {name}")


def _write(folder: Path, groups: Groups, state: Mapping[str, Any]) -> dict[str, Any]:
    """Bring all files onto the disk; what their mark says of them."""
    for group, tensors in groups.items():
        complex_ones = {key: v.detach() for key, v in tensors.items() if v.is_complex()}
        real = {key: v for key, v in tensors.items() if key not in complex_ones}
        real |= {f"{key}{_COMPLEX}": torch.view_as_real(v) for key, v in complex_ones.items()}
        save_tensors(real, folder / f"{group}.safetensors")
    (folder / STATE).write_text(json_text(state), encoding="utf-8")
    files = sorted(folder.iterdir())
    for path in [*files, folder]:
        flush(path)
    return {
        "files": {path.name: path.stat().st_size for path in files},
        "checksums": {path.name: _checksum(path) for path in files},
    }


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(iter(partial(file.read, _CHUNK), b""))


def _write_mark(folder: Path, mark: Mapping[str, Any]) -> None:
    write_json({**mark, "checksum": checksum([json_text(mark).encode()])}, folder / MARK)


def _read_mark(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint, their sizes and checksums, and its validation loss."""
    mark = read_json(folder / MARK)
    own = mark.pop("checksum", None)
    new = own is not None or "checksums" in mark  # older ones have neither
    if new and own != checksum([json_text(mark).encode()]):
        raise CheckpointError(f"{folder / MARK}: damaged, its checksum is not {own}")
    if not isinstance(mark.get("files"), dict):
        raise CheckpointError(f"{folder / MARK}: damaged, it lists no files")
    return mark
