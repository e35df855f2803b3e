"""What the text encoders read of an image's caption, drawn anew each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Captions:
    """How captions are drawn, from the global generator of :mod:`random`.

    Attributes:
        dropout: share of captions replaced by the empty one (Ho & Salimans 2022, algorithm 1).
        shuffle: whether a caption's parts, between commas, change places.
        keep: how many of the first parts stay in place.
    """

    dropout: float = 0.0
    shuffle: bool = False
    keep: int = 0

    def draw(self, caption: str) -> str:
        """The caption of one reading of an image."""
        if self.dropout and random.random() < self.dropout:
            return ""
        if not self.shuffle:
            return caption
        parts = [part.strip() for part in caption.split(",")]
        kept, rest = parts[: self.keep], parts[self.keep :]
        random.shuffle(rest)
        return ", ".join([*kept, *rest])


def token_ids(tokenizers: Sequence[Any], text: str) -> Tensor:
    """Token ids [E, L] of a text for E encoders, cut to the length that they read.

    The text is plain: brackets are no weights, as in the training of Stable Diffusion itself.
    """
    rows = []
    for tokenizer in tokenizers:
        found = tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        rows.append(found.input_ids[0])
    return torch.stack(rows)


def is_cut(tokenizer: Any, text: str) -> bool:
    """Whether a text has more tokens than the encoder reads."""
    return len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length
