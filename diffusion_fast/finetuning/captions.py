"""What the text encoders read of an image's caption, drawn anew each time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.embeddings import pattern
from ..models.prompt import Token, packed, plain_words


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

    def texts(self, caption: str) -> list[str]:
        """All texts that :meth:`draw` can make of a caption, but for the empty one and the order
        of parts."""
        if self.word is None:
            return [caption]
        chosen = self.templates if caption == "{}" else (caption,)
        return [one.replace("{}", self.word) for one in chosen]

    def draw(self, caption: str) -> str:
        """The caption of one reading of an image."""
        if self.dropout and random.random() < self.dropout:
            return ""
        caption = random.choice(self.texts(caption))
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


def token_ids(
    tokenizers: Sequence[Any], text: str, word: Word | None = None, chunks: int = 1
) -> Tensor:
    """Token ids [E, chunks * L] of a text for E encoders that read L tokens at once.

    Texts are cut into chunks as the pipelines' prompts are, and filled up with empty ones. They are
    plain: brackets are no weights, as in the training of Stable Diffusion itself.

    Args:
        tokenizers: those of the encoders.
        text: the caption.
        word: a word of its own; None for none.
        chunks: how many there are, at least as many as :func:`chunks_of` says.
    """
    rows = []
    for number, tokenizer in enumerate(tokenizers):
        length = tokenizer.model_max_length
        ids = torch.full((chunks, length), tokenizer.pad_token_id)
        ids[:, 0], ids[:, 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        for i, chunk in enumerate(packed(_words(tokenizer, text, word, number), length - 2)):
            ids[i, 1 : len(chunk) + 1] = torch.tensor([one for one, _, _ in chunk]).long()
            ids[i, len(chunk) + 1] = tokenizer.eos_token_id
        rows.append(ids.flatten())
    return torch.stack(rows)


def chunks_of(
    tokenizers: Sequence[Any], text: str, word: Word | None = None, shuffled: bool = False
) -> int:
    """How many chunks a text needs, or with ``shuffled`` at most, in any order of its parts."""
    most = 1
    for number, tokenizer in enumerate(tokenizers):
        room = tokenizer.model_max_length - 2
        if not shuffled:
            most = max(most, len(packed(_words(tokenizer, text, word, number), room)))
            continue
        plain = ", ".join(part.strip() for part in text.split(","))
        lengths = [len(one) for one in _words(tokenizer, plain, word, number)]
        total, longest = sum(lengths), min(max(lengths, default=1), room)
        if total > room:  # each chunk but the last has less room left than the longest word
            most = max(most, -(-total // (room - longest + 1)))
    return most


def _words(tokenizer: Any, text: str, word: Word | None, encoder: int) -> Iterator[list[Token]]:
    """The tokens of each word."""
    if word is None:
        yield from plain_words(text, 1.0, tokenizer)
        return
    for i, piece in enumerate(pattern([word.text]).split(text)):
        if i % 2:
            first = word.first[encoder]
            yield [(token, 1.0, None) for token in range(first, first + word.count)]
        else:
            yield from plain_words(piece, 1.0, tokenizer)
