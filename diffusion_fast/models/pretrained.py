"""Any path to a model: a diffusers folder, a file in one, a CompVis file, or a hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import AnyPath, CheckpointError
from . import hub, single_file
from .checkpoints import CONFIG, STEM, Config, find_model, read_config, weight_files
from .tensors import Rename, Source, Stored, stored


def find_pretrained(
    path: AnyPath,
    subfolder: str,
    parse: Callable[[dict[str, Any]], Config],
    variant: str | None = None,
    rename: Rename = str,
    scaling: float | None = None,
) -> Source[Config]:
    """A model's config and the names and shapes of its tensors; no tensor is read.

    Args:
        path: a folder with ``config.json`` and weights, a pipeline's folder with such a folder in
            it, a file of weights beside its ``config.json``, a CompVis file, an autoencoder's file
            in diffusers' names, or a hub id.
        subfolder: the model's place in a pipeline, ``"unet"`` or ``"vae"``.
        parse: makes the config of the contents of ``config.json``.
        variant: which weights of a folder to read, such as ``"fp16"``.
        rename: the model's name for a name in diffusers' files, such as one of an older version.
        scaling: scaling factor of an autoencoder alone, see :func:`.single_file.identify`.

    Raises:
        CheckpointError: a missing or damaged file, or an unsupported config.
    """
    models = {subfolder: STEM, "": STEM}
    path = hub.resolve(path, models=models, variant=variant, others=())
    if path.is_file() and path.name != CONFIG:
        names = stored(weight_files(path, path.parent, variant), rename)
        told = not (path.parent / CONFIG).is_file() or single_file.is_single_file(names)
        if told and (source := _of_shapes(path, subfolder, names, scaling)):
            return source
    folder = find_model(path, subfolder)
    config = read_config(folder, parse)
    files = weight_files(path, folder, variant)
    return Source(files[0], config, stored(files, rename))


def _of_shapes(
    path: Path, subfolder: str, names: Mapping[str, Stored], scaling: float | None
) -> Source[Any] | None:
    """A model whose config is in its tensors' shapes; None where that of diffusers is needed."""
    if "down_blocks.0.resnets.0.conv1.weight" in names:  # a U-Net in diffusers' names
        return None
    source: Source[Any] | None = getattr(
        single_file.identify_tensors(path, names, scaling), subfolder
    )
    if source is None:
        raise CheckpointError(f"{path}: has no {subfolder}")
    return source
