"""Prompts: weights written into the text, and chunks for what is longer than an encoder reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRONGER = 1.1  # (word); [word] is divided by it
_CLOSES = {")": "(", "]": "["}
_TOKEN = re.compile(
    r"\\[()\[\]\\]"  # an escaped bracket or backslash
    r"|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"  # a weight and its closing parenthesis
    r"|[()\[\]]"
    r"|[^\\()\[\]:]+"
    r"|[\\:]"
)


@dataclass
class _Piece:
    text: str
    weight: float = 1.0


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""A prompt as pieces of text with their weights.

    ``(word)`` has weight 1.1, ``[word]`` 1 / 1.1 and ``(word:1.3)`` 1.3; nested brackets multiply.
    ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` stand for the characters themselves, and so does a
    bracket without its partner. Neighbours of the same weight are one piece.
    """
    pieces: list[_Piece] = []
    opened: list[int] = []  # indices of pieces that hold an opening bracket
    for token in _TOKEN.findall(prompt):
        if token in ("(", "["):
            opened.append(len(pieces))
        elif (start := _partner(pieces, opened, token)) is not None:
            weight = {")": STRONGER, "]": 1 / STRONGER}.get(token)
            weight = float(token[1:-1]) if weight is None else weight
            pieces[start].text = ""
            for piece in pieces[start + 1 :]:
                piece.weight *= weight
            continue
        pieces.append(_Piece(token[1:] if token[0] == "\\" and len(token) > 1 else token))
    merged: list[_Piece] = []
    for piece in pieces:
        if merged and merged[-1].weight == piece.weight:
            merged[-1].text += piece.text
        elif piece.text:
            merged.append(piece)
    return [(piece.text, piece.weight) for piece in merged]


def _partner(pieces: list[_Piece], opened: list[int], token: str) -> int | None:
    """The newest opening bracket that ``token`` closes; those inside it stay text."""
    kind = _CLOSES.get(token[-1]) if token[0] != "\\" else None
    for depth in reversed(range(len(opened)) if kind else ()):
        if pieces[opened[depth]].text == kind:
            start = opened[depth]
            del opened[depth:]
            return start
    return None


@dataclass(frozen=True)
class Tokens:
    """Token ids and their weights of a batch of prompts, [B, chunks, length]."""

    ids: Tensor
    weights: Tensor


def tokenize(prompts: Sequence[str], tokenizer: Any, length: int = 77) -> Tokens:
    """Prompts as chunks that a text encoder reads, all with the same number of chunks.

    Each chunk is the start token, up to ``length - 2`` tokens of the prompt, the end token and
    padding. A prompt of one chunk and no weights has the ids that the tokenizer itself gives it; an
    empty one, or one shorter than the longest, is filled up with empty chunks.

    Args:
        prompts: B texts, weighted as :func:`parse` describes.
        tokenizer: a CLIP tokenizer of ``transformers``.
        length: tokens of a chunk.
    """
    room = length - 2
    split = [_tokens(prompt, tokenizer) for prompt in prompts]
    count = max(1, *(-(-len(tokens) // room) for tokens in split))
    shape = len(split), count, length
    ids = torch.full(shape, tokenizer.pad_token_id, dtype=torch.int64)
    weights = torch.ones(shape)
    ids[..., 0] = tokenizer.bos_token_id
    for i, tokens in enumerate(split):
        for k in range(count):
            part = tokens[k * room : (k + 1) * room]
            ids[i, k, len(part) + 1] = tokenizer.eos_token_id
            for j, (token, weight) in enumerate(part, 1):
                ids[i, k, j], weights[i, k, j] = token, weight
    return Tokens(ids, weights)


def _tokens(prompt: str, tokenizer: Any) -> list[tuple[int, float]]:
    return [
        (token, weight)
        for text, weight in parse(prompt)
        for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ]
