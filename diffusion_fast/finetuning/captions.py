"""What the text encoders read of an image's caption, drawn anew each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.embeddings import pattern


@dataclass(frozen=True)
class Captions:
    """How captions are drawn, from the global generator of :mod:`random`.

    Attributes:
        dropout: share of captions replaced by the empty one (Ho & Salimans 2022, algorithm 1).
        shuffle: whether a caption's parts, between commas, change places.
        keep: how many of the first parts stay in place.
        word: what ``{}`` in a caption stands for; None leaves it as it is.
        templates: captions to draw from in the place of the caption ``{}``.
    """

    dropout: float = 0.0
    shuffle: bool = False
    keep: int = 0
    word: str | None = None
    templates: tuple[str, ...] = ()

    def draw(self, caption: str) -> str:
        """The caption of one reading of an image."""
        if self.dropout and random.random() < self.dropout:
            return ""
        if self.word is not None:
            chosen = random.choice(self.templates) if caption == "{}" else caption
            caption = chosen.replace("{}", self.word)
        if not self.shuffle:
            return caption
        parts = [part.strip() for part in caption.split(",")]
        kept, rest = parts[: self.keep], parts[self.keep :]
        random.shuffle(rest)
        return ", ".join([*kept, *rest])


@dataclass(frozen=True)
class Word:
    """A word that vectors stand for, as ids behind those of a vocabulary.

    Attributes:
        text: the word.
        count: number of its vectors.
        first: id of its first vector, for each text encoder.
    """

    text: str
    count: int
    first: tuple[int, ...]


def token_ids(tokenizers: Sequence[Any], text: str, word: Word | None = None) -> Tensor:
    """Token ids [E, L] of a text for E encoders, cut to the length that they read.

    The text is plain: brackets are no weights, as in the training of Stable Diffusion itself.

    Args:
        tokenizers: those of the encoders.
        text: the caption.
        word: a word of its own; None for none.
    """
    rows = []
    for number, tokenizer in enumerate(tokenizers):
        if word is not None:
            rows.append(_with_word(tokenizer, text, word, word.first[number]))
            continue
        found = tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        rows.append(found.input_ids[0])
    return torch.stack(rows)


def _with_word(tokenizer: Any, text: str, word: Word, first: int) -> Tensor:
    ids: list[int] = []
    for i, piece in enumerate(pattern([word.text]).split(text)):
        if i % 2:
            ids += range(first, first + word.count)
        else:
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    room = tokenizer.model_max_length
    ids = [tokenizer.bos_token_id, *ids[: room - 2], tokenizer.eos_token_id]
    return torch.tensor(ids + [tokenizer.pad_token_id] * (room - len(ids)))


def is_cut(tokenizer: Any, text: str) -> bool:
    """Whether a text has more tokens than the encoder reads."""
    return len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length
