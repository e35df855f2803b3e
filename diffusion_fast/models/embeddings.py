"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): trained vectors in the place of a word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import AnyPath, CheckpointError
from ..ops import checks
from . import contents

PAIR = ("clip_l", "clip_g")  # names of SDXL's two encoders in a file
MOST_VECTORS = 75  # tokens of a chunk


class Embeddings:
    """The embeddings of a model's text encoders, each a word that prompts can use.

    The word stands for one or several vectors, in the place of tokens; weights and brackets work as
    for any word. Upper and lower case are the same, and ComfyUI's ``embedding:word`` works too.

    Args:
        widths: channels of each encoder's token embeddings.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = tuple(widths)
        self._loaded: dict[str, list[Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All words."""
        return list(self._loaded)

    def load(self, path: AnyPath, name: str | None = None) -> str:
        """Read a file of the web UI (``.pt``, ``.safetensors``) or of diffusers.

        Args:
            path: the file. For SDXL it has a pair of tensors, ``clip_l`` and ``clip_g``.
            name: the word; by default the token in a file of diffusers, else the file's name.

        Returns:
            The word.

        Raises:
            CheckpointError: a damaged file, something else than an embedding, or one for another
                model; nothing changes then.
            ValueError: a name that is taken or empty.
        """
        path = Path(path)
        token, tensors = _identify(path, _contents(path))
        name = (path.stem if token is None else token) if name is None else name
        if not isinstance(name, str) or not name.strip():
            checks.fail("name", "a word", repr(name))
        if name.lower() in map(str.lower, self._loaded):
            checks.fail("name", f"one that isn't taken ({', '.join(self._loaded)})", repr(name))
        wanted = f"{len(self._widths)} tensors of width {' and '.join(map(str, self._widths))}"
        widths = tuple(tensor.shape[-1] for tensor in tensors)
        if widths != self._widths:
            raise CheckpointError(
                f"{path}: expected an embedding for this model ({wanted}), got one of width"
                f" {' and '.join(map(str, widths))}"
            )
        self._loaded[name] = tensors
        return name

    def put(self, name: str, vectors: Sequence[Tensor]) -> None:
        """Give a word vectors [n, C] for each encoder, in the place of those that it had."""
        self._loaded[name] = list(vectors)

    def unload(self, name: str) -> None:
        """Forget a word. Raises ValueError: it isn't loaded."""
        checks.one_of("name", name, self._loaded)
        del self._loaded[name]

    def of(self, encoder: int) -> dict[str, Tensor]:
        """The vectors [n, C] of each word for one of the encoders."""
        return {name: tensors[encoder] for name, tensors in self._loaded.items()}


def pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Finds the words of embeddings in a text: group i is ``names[i]``."""

    def one(name: str) -> str:
        start = r"(?<![\w-])" if re.match(r"\w", name) else ""
        end = r"(?![\w-])" if re.search(r"\w\Z", name) else ""
        return f"{start}({re.escape(name)}){end}"

    return re.compile("|".join(map(one, names)) or r"(?!)", re.IGNORECASE)


def _kind(found: Any) -> str:
    names = [name for name in found if isinstance(name, str)] if isinstance(found, Mapping) else []
    return contents.by_names(names) or f"{type(found).__name__} {', '.join(names[:3])}".strip()


def _contents(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            head = file.read(contents.HEAD)
        if head[8:9] == b"{":
            return load_file(path)
        if kind := contents.by_bytes(head):
            raise ValueError(f"it is {kind}")
        with torch.serialization.safe_globals([nn.ParameterDict]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{path}: can't be read as an embedding: {error}") from error


def _identify(path: Path, found: Any) -> tuple[str | None, list[Tensor]]:
    """The token that a file names, and its vectors [n, C] for each encoder."""
    token = None
    if isinstance(found, Mapping) and "string_to_param" in found:  # the web UI's
        found = found["string_to_param"]
        found = list(getattr(found, "_parameters", found).values())
    elif isinstance(found, Mapping) and found.keys() == set(PAIR):
        found = [found[name] for name in PAIR]
    elif isinstance(found, Mapping) and len(found) == 1:
        [(token, tensor)] = found.items()
        token, found = None if token == "emb_params" else str(token), [tensor]
    tensors = found if isinstance(found, list) else [found]
    tensors = [one[None] if isinstance(one, Tensor) and one.dim() == 1 else one for one in tensors]
    good = (
        isinstance(one, Tensor)
        and one.is_floating_point()
        and one.dim() == 2
        and one.shape[1] > 0
        and 0 < len(one) == len(tensors[0]) <= MOST_VECTORS
        and one.isfinite().all()
        for one in tensors
    )
    if not tensors or not all(good):
        raise CheckpointError(
            f"{path}: expected an embedding: finite vectors [n, C], 1 to {MOST_VECTORS} of them, of"
            f" the web UI, diffusers or a pair {', '.join(PAIR)}; got {_kind(found)}"
        )
    return token, [one.detach().clone() for one in tensors]
