"""Tensors kept on the disk under a hash of all that made them, each file with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError, checksum, read_tensors, save_tensors, whole

_CHECKSUM = "crc32"  # beside the tensors in a file
_AGAIN = "remove it and cache the latents again"

Tensors = dict[str, Tensor]


def fingerprint(modules: dict[str, nn.Module], more: object = None) -> str:
    """A hash of weights, configurations and ``more``."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for part, module in sorted(modules.items()):
        config = getattr(module, "config", None)
        values = config.to_dict() if config is not None else {}
        named = {k: v for k, v in values.items() if k != "transformers_version"}
        digest.update(json.dumps([part, named], sort_keys=True, default=str).encode())
        for piece in _contents(module.state_dict()):
            digest.update(piece)
    return digest.hexdigest()


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """All that makes tensors what they are, as bytes: names, dtypes, shapes and numbers."""
    for name, value in sorted(tensors.items()):
        yield f"{name} {value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def place(folder: Path, made_of: Sequence[object]) -> Path:
    """The file of what was made of these (JSON types)."""
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"  # not all in one folder


def write(path: Path, tensors: Tensors) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    own = torch.tensor(int(checksum(_contents(tensors)), 16))
    with whole(path) as (temporary,):
        save_tensors(tensors | {_CHECKSUM: own}, temporary)


def read(path: Path, wanted: str) -> Tensors:
    """The tensors in a file: one of the name ``wanted``, and ``text_embeds`` if it has them.

    Raises:
        CheckpointError: it is damaged, or holds something else; the message says what to do.
    """
    try:
        tensors = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_AGAIN}") from error
    own = tensors.pop(_CHECKSUM, None)
    if tensors.keys() - {"text_embeds"} != {wanted}:
        raise CheckpointError(f"{path}: expected {wanted}, got {sorted(tensors)}; {_AGAIN}")
    if own is not None and own.tolist() != int(checksum(_contents(tensors)), 16):
        raise CheckpointError(f"{path}: damaged, its checksum is another; {_AGAIN}")
    return tensors
