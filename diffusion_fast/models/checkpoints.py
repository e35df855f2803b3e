"""Reading and writing models: a diffusers folder, config.json beside safetensors files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"  # of weights in several files

AnyPath = str | os.PathLike[str]
Config = TypeVar("Config")


class CheckpointError(ValueError):
    """A file is missing, damaged, or belongs to another model; the message names it."""


def find_model(path: AnyPath, subfolder: str) -> Path:
    """The folder that holds a model's config.json.

    Args:
        path: that folder itself, the folder of a whole pipeline, or a file in the model's folder.
        subfolder: where a pipeline keeps this model, such as ``"unet"``.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    candidates = [path, path / subfolder] if path.is_dir() else [path.parent]
    for folder in candidates:
        if (folder / CONFIG).is_file():
            return folder
    tried = " or ".join(str(folder) for folder in candidates)
    raise CheckpointError(f"{path}: not a diffusers model, there is no {CONFIG} in {tried}")


def read_config(folder: Path, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """The folder's config.json, as ``parse`` understands it.

    Raises:
        CheckpointError: it can't be read, or ``parse`` refused it with a ValueError.
    """
    values = read_json(folder / CONFIG)
    try:
        return parse(values)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it can't be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def weight_files(path: AnyPath, folder: Path) -> list[Path]:
    """The safetensors files of a model: ``path`` if it is a file, else those in ``folder``.

    Raises:
        CheckpointError: there are none, or a part of a sharded model is missing.
    """
    path = Path(path)
    if path.is_file() and path.name != CONFIG:
        return [path]
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder}: expected {WEIGHTS} or {INDEX}, found {found}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map of tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # a path could lead anywhere
            raise CheckpointError(f"{folder / INDEX}: expected plain file names, got {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, but listed in {INDEX}")
    return [folder / name for name in names]


def load_weights(
    model: nn.Module,
    files: Sequence[Path],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a model that was built on the meta device, without a second copy of the weights.

    Names and shapes are compared before any tensor is read. On the CPU, tensors of the right dtype
    stay mapped from their file until they are written to.

    Args:
        model: with all parameters and buffers on the meta device, left as it is on errors.
        files: safetensors files that hold each tensor once.
        dtype: of the loaded model; None for that of the files.
        device: where to put it.

    Raises:
        CheckpointError: a damaged file, or missing, extra, repeated or misshapen tensors (listed).
    """
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    _compare(expected, files)
    state: dict[str, Tensor] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                state[name] = handle.get_tensor(name).to(device=device, dtype=dtype)
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1 or not all(value.is_floating_point for value in dtypes):
        kinds = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"{files[0]}: expected one floating dtype, got {kinds}; pass dtype=")
    model.load_state_dict(state, strict=True, assign=True)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        message = f"{file}: truncated, or not a safetensors file: {error}"
        raise CheckpointError(message) from error


def _compare(expected: Mapping[str, list[int]], files: Sequence[Path]) -> None:
    found: dict[str, list[int]] = {}
    problems = []
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in found:
                    problems.append(f"repeated: {name}")
                found[name] = handle.get_slice(name).get_shape()
    problems += [f"missing: {name} {expected[name]}" for name in expected.keys() - found.keys()]
    problems += [f"extra: {name} {found[name]}" for name in found.keys() - expected.keys()]
    problems += [
        f"misshapen: {name} expected {expected[name]}, got {found[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        count = f"{len(problems)} of its tensors" if len(problems) > 1 else "one of its tensors"
        raise CheckpointError(f"{files[0]}: not this model's weights, {count}:{lines}")


def save_model(model: nn.Module, config: Mapping[str, Any], folder: AnyPath) -> None:
    """Write ``config.json`` and one safetensors file, as diffusers does.

    Both files are complete on the disk before either takes its name, so an interruption or a full
    disk leaves what was there before.

    Raises:
        OSError: the folder can't be written; no part of a file is left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    names = (CONFIG, WEIGHTS)
    temporary = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        temporary[0].write_text(text, encoding="utf-8")
        save_file(state, temporary[1], metadata={"format": "pt"})
        for path in temporary:
            flush(path)
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, folder / name)
        (folder / INDEX).unlink(missing_ok=True)  # of weights saved earlier, in several files
        flush(folder)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{folder}: can't be written: {error}") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def write_json(value: Mapping[str, Any], path: AnyPath) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except OSError as error:
        raise OSError(f"{folder}: can't be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
