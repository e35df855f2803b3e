"""Models by hub id, ``owner/name``: fetched with ``huggingface_hub``, or found in its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """A local path as it is; a hub id as the folder that its files were fetched to.

    ``HF_HUB_OFFLINE``, ``HF_HOME`` and the other settings of ``huggingface_hub`` hold.

    Args:
        path_or_id: what exists here is a path; only another string can be a hub id.
        revision: a branch, tag or commit of the hub's repository.
        allow_patterns: the files to fetch, see :func:`model_files` and :func:`pipeline_files`;
            None for those of a pipeline.

    Raises:
        CheckpointError: neither a path that exists nor an id; an id that isn't in the cache and
            can't be fetched; ``huggingface_hub`` isn't installed.
    """
    path = Path(path_or_id)
    if path.exists():
        return path
    if not isinstance(path_or_id, str) or not _ID.fullmatch(path_or_id):
        raise CheckpointError(
            f"{path_or_id}: no such file or folder, and not a hub id (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise CheckpointError(
            f"{path_or_id}: no such file or folder; to fetch it as a hub id,"
            " pip install huggingface_hub"
        ) from error
    patterns = pipeline_files() if allow_patterns is None else list(allow_patterns)
    try:
        found = snapshot_download(path_or_id, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            reason = f"as a hub id it is refused: {_first_line(error)}"
        else:
            reason = (
                "as a hub id it isn't in the local cache and can't be fetched"
                f" ({_first_line(error)}). Without a network, fetch it elsewhere with"
                f" `hf download {path_or_id}` and copy the folder here or into the cache"
            )
        raise CheckpointError(f"{path_or_id}: no such file or folder, and {reason}") from error
    return Path(found)


def model_files(subfolder: str, variant: str | None = None, stem: str = "") -> list[str]:
    """Patterns of a model's files, in a pipeline's folder ``subfolder`` or at the root.

    Args:
        variant: such as ``"fp16"``; other variants aren't fetched.
        stem: what the weights' names begin with, that of diffusers by default.
    """
    stem = stem or "diffusion_pytorch_model"
    label = f".{variant}" if variant else ""
    weights = [
        f"{stem}{label}.safetensors",
        f"{stem}{label}-?????-of-?????.safetensors",
        f"{stem}-?????-of-?????{label}.safetensors",
        f"{stem}.safetensors.index{label}.json",
    ]
    names = ["config.json", *dict.fromkeys(weights)]
    return [f"{subfolder}/{name}" for name in names] + names


def pipeline_files(variant: str | None = None) -> list[str]:
    """Patterns of everything that a Stable Diffusion pipeline reads."""
    models = [name for model in ("unet", "vae") for name in model_files(model, variant)]
    texts = [
        name
        for encoder in ("text_encoder", "text_encoder_2")
        for name in model_files(encoder, variant, "model")
    ]
    folders = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "safety_checker")
    others = ["model_index.json", *(f"{folder}/*.json" for folder in folders)]
    others += [f"{folder}/*.txt" for folder in ("tokenizer", "tokenizer_2")]
    return sorted({name for name in models + texts if "/" in name}) + others


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
