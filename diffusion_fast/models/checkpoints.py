"""Reading and writing models: a diffusers folder, config.json beside safetensors files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..files import AnyPath, CheckpointError, json_text, read_json, save_tensors, whole

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files

Config = TypeVar("Config")


def find_model(path: AnyPath, subfolder: str) -> Path:
    """Find the folder that holds a model's config.json.

    Args:
        path: the model's folder, one of a whole pipeline, or a file in the model's folder.
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
    except (ValueError, TypeError, OverflowError) as error:  # of values of another type too
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def weight_files(
    path: AnyPath, folder: Path, variant: str | None = None, stem: str = STEM
) -> list[Path]:
    """The files with a model's weights: ``path`` if it is a file, else those in ``folder``.

    Args:
        variant: such as ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``.
        stem: what the files' names begin with; ``"model"`` for those of transformers.

    Raises:
        CheckpointError: there are none, only other variants, or a part of a sharded model is
            missing.
    """
    path = Path(path)
    if path.is_file() and path.name != CONFIG:
        if variant is not None:
            raise CheckpointError(f"{path}: variant: expected None for a file, got {variant!r}")
        return [path]
    suffix = f".{variant}" if variant else ""
    if (file := _weights(folder, variant, stem)) is not None:
        return _shards(file) if file.suffix == ".json" else [file]
    expected = f"{stem}{suffix}.safetensors or {stem}.safetensors.index{suffix}.json"
    found = sorted(p.name for p in folder.iterdir())
    others = _variants(stem, found)
    hint = "".join(f"; pass variant={other!r}" for other in others[:1])
    names = ", ".join(found) or "nothing"
    raise CheckpointError(f"{folder}: expected {expected}, found {names}{hint}")


def has_weights(folder: Path, variant: str | None, stem: str = STEM) -> bool:
    """Whether a folder has a model's weights in this variant."""
    return _weights(folder, variant, stem) is not None


def _weights(folder: Path, variant: str | None, stem: str) -> Path | None:
    """The file with all weights, or the index of those that have them."""
    suffix = f".{variant}" if variant else ""
    pickled = f"pytorch_{stem}" if stem == "model" else stem  # as transformers called it
    for name, kind in ((stem, "safetensors"), (pickled, "bin")):
        for file in (f"{name}.{kind}.index{suffix}.json", f"{name}{suffix}.{kind}"):
            if (folder / file).is_file():
                return folder / file
    return None


def _variants(stem: str, names: list[str]) -> list[str]:
    pattern = rf"{re.escape(stem)}(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)"
    found = (re.fullmatch(pattern, name) for name in names)
    return sorted({match[1] or match[2] for match in found if match})


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # a path could lead anywhere
            raise CheckpointError(f"{index}: expected plain file names, got {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: missing, but listed in {index.name}")
    return [index.parent / name for name in names]


def save_model(
    model: nn.Module,
    config: Mapping[str, Any],
    folder: AnyPath,
    file_name: Callable[[str], str] = str,
) -> None:
    """Write ``config.json`` and one safetensors file, as diffusers does.

    ``file_name`` gives the name in the file for a name of the model's; the same by default.

    Both files are complete on the disk before either takes its name, so an interruption or a full
    disk leaves what was there before.

    Raises:
        OSError: the folder can't be written; no part of a file is left.
    """
    folder = Path(folder)
    with whole(folder / CONFIG, folder / WEIGHTS) as (config_file, weights_file):
        config_file.write_text(json_text(config), encoding="utf-8")
        save_tensors({file_name(n): v for n, v in model.state_dict().items()}, weights_file)
    (folder / INDEX).unlink(missing_ok=True)  # of weights saved earlier, in several files
