"""Models by hub id, ``owner/name``: fetched with ``huggingface_hub``, or found in its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import CheckpointError
from .checkpoints import CONFIG, STEM, has_weights

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


MODELS = {"unet": STEM, "vae": STEM, "text_encoder": "model", "text_encoder_2": "model"}
OTHERS = (
    "model_index.json",
    *(f"{name}/*.json" for name in ("scheduler", "feature_extractor", "safety_checker")),
    *(f"{name}/*.{kind}" for name in ("tokenizer", "tokenizer_2") for kind in ("json", "txt")),
)


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    models: Mapping[str, str] = MODELS,
    variant: str | None = None,
    others: Sequence[str] = OTHERS,
) -> Path:
    """A local path as it is; a hub id as the folder that its files were fetched to.

    Of each model one form of its weights is fetched, the first that the repository has: the
    variant, else the plain ones if another model has the variant; as safetensors, else as pickles.

    ``HF_HUB_OFFLINE``, ``HF_HOME`` and the other settings of ``huggingface_hub`` hold.

    Args:
        path_or_id: what exists here is a path; only another string can be a hub id.
        revision: a branch, tag or commit of the hub's repository.
        models: the folders of the models to fetch, with what their weights' names begin with; ""
            is the repository's root. All of a pipeline by default.
        variant: which weights, such as ``"fp16"``.
        others: patterns of more files to fetch.

    Raises:
        CheckpointError: neither a path that exists nor an id; an id that isn't in the cache and
            can't be fetched; no model there has the variant (before other weights are fetched);
            ``huggingface_hub`` isn't installed.
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
    forms = [(v, kind) for v in dict.fromkeys((variant, None)) for kind in ("safetensors", "bin")]
    patterns, found, lacking = list(others), Path(), models
    for form in forms:
        if form[0] != variant and not any(
            has_weights(found / name, variant, stem) for name, stem in models.items()
        ):
            raise CheckpointError(
                f"{path_or_id}: variant: no model in it has weights of {variant!r}"
            )
        patterns += [name for model in lacking.items() for name in model_files(*model, *form)]
        try:
            found = Path(snapshot_download(path_or_id, revision=revision, allow_patterns=patterns))
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
        lacking = {n: stem for n, stem in lacking.items() if _lacks(found / n, form[0], stem)}
        patterns = []
        if not lacking:
            break
    return found


def model_files(folder: str, stem: str, variant: str | None, kind: str) -> list[str]:
    """Patterns of one model's files: its config, and one form of its weights.

    Args:
        folder: the model's place in the repository; "" for the root.
        stem: what the names of its weights begin with.
        variant: such as ``"fp16"``.
        kind: ``"safetensors"`` or ``"bin"``.
    """
    name = f"pytorch_{stem}" if (stem, kind) == ("model", "bin") else stem
    label = f".{variant}" if variant else ""
    weights = [
        f"{name}{label}.{kind}",
        f"{name}{label}-?????-of-?????.{kind}",
        f"{name}-?????-of-?????{label}.{kind}",
        f"{name}.{kind}.index{label}.json",
    ]
    prefix = f"{folder}/" if folder else ""
    return [prefix + one for one in ("config.json", *dict.fromkeys(weights))]


def _lacks(folder: Path, variant: str | None, stem: str) -> bool:
    """Whether a model is there but its weights are not."""
    return (folder / CONFIG).is_file() and not has_weights(folder, variant, stem)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
