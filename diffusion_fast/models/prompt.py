"""Prompts: weights written into the text, and chunks for what is longer than an encoder reads.

The syntax is that of AUTOMATIC1111's web UI. What it has beyond weights and ``BREAK``, and what
other programs write into prompts, is refused by name: read as words, it would spoil pictures in
silence. (What changes with the steps, :mod:`.prompt_edits` has read before.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from .embeddings import pattern

STRONGER = 1.1  # (word); [word] is divided by it
MOST = 1000.0  # a weight's size: states times more overflow in half precision
_NUMBER = r"[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|(?i:nan|inf|infinity))"
_TOKEN = re.compile(
    r"\\[()\[\]\\]"  # an escaped bracket or backslash
    rf"|:\s*{_NUMBER}\s*\)"  # a weight and its closing parenthesis
    r"|[()\[\]]"
    r"|\bBREAK\b"
    r"|(?:(?!\bBREAK\b)[^\\()\[\]:])+"
    r"|[\\:]"
)
_FOREIGN = {  # what other programs read, and what to use instead
    r"<(?i:lora|lyco|hypernet)\s*:[^<>]*>": "load it with pipe.loras.load(file, name, scale)",
    r"(?<!\w)embedding:[^\s,()\[\]]+": "load it with pipe.embeddings.load(file, name)",
    r"\bAND\b": "prompts are not composed; join them by a comma, or write 'and'",
    r"\{[^{}|]*\|[^{}]*\}": "no choice is made; write one of them",
    r"\.(?:and|blend|swap)\(": "prompts are not composed; weights are written (word:1.3)",
    r"\)(?:\d*\.\d+|\++)(?=[\s,)]|$)": "weights are written (word:1.3)",
}

Piece = tuple[str, float]  # a text and its weight
Token = tuple[int, float, Tensor | None]  # an id, its weight, and a vector in its place


def parse(prompt: str, name: str = "prompt", embeddings: Collection[str] = ()) -> list[list[Piece]]:
    r"""A prompt as pieces of text with their weights, in sections that begin a chunk of their own.

    ``(word)`` has weight 1.1, ``[word]`` 1 / 1.1 and ``(word:1.3)`` 1.3; nested brackets multiply.
    ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` stand for the characters themselves, and so does a
    bracket without its partner. Neighbours of the same weight are one piece. The word ``BREAK``
    stands between sections.

    Args:
        name: what to call the prompt in errors.
        embeddings: words that may stand behind ``embedding:``, which is taken away.

    Raises:
        ValueError: a weight that isn't finite, or beyond 1000; syntax that isn't supported, such
            as ``[from:to:0.5]``, ``[a|b]``, ``AND`` or ``<lora:x:0.8>``; a lone surrogate.
    """
    for known in sorted(embeddings, key=len, reverse=True):
        prompt = re.sub(rf"\bembedding:(?={re.escape(known)})", "", prompt, flags=re.IGNORECASE)
    for foreign, instead in _FOREIGN.items():
        if found := re.search(foreign, prompt):
            checks.fail(name, f"none of other programs' syntax ({instead})", repr(found[0]))
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        checks.fail(name, "text that UTF-8 can hold", ascii(prompt)[:60])
    tokens = _TOKEN.findall(prompt)
    factors = _factors(tokens, name)
    sections: list[list[Piece]] = [[]]
    weights = [1.0]  # a factor is None where its bracket closes
    for i, token in enumerate(tokens):
        if i in factors:
            factor = factors[i]
            weights.pop() if factor is None else weights.append(weights[-1] * factor)
            if not abs(weights[-1]) <= MOST:
                checks.fail(name, f"weights of at most {MOST:g}", f"{weights[-1]:g}")
        elif token == "BREAK":
            sections.append([])
        else:
            text = token[1:] if token[0] == "\\" and len(token) > 1 else token
            if sections[-1] and sections[-1][-1][1] == weights[-1]:
                text = sections[-1].pop()[0] + text
            sections[-1].append((text, weights[-1]))
    return sections


def _factors(tokens: Sequence[str], name: str) -> dict[int, float | None]:
    """For each bracket that has its partner: what it multiplies weights by, None if it closes.

    A closing bracket takes the newest opening one of its kind; those opened since stay text.
    """
    factors: dict[int, float | None] = {}
    opened: list[int] = []
    unclosed = {"(": 0, "[": 0}
    bar = -1  # the newest token with a | in it
    for i, token in enumerate(tokens):
        bar = i if "|" in token else bar
        if token in unclosed:
            opened.append(i)
            unclosed[token] += 1
        kind = {")": "(", "]": "["}.get(token[-1]) if token[0] != "\\" else None
        if kind is None or not unclosed[kind]:
            continue
        start = -1
        while start < 0 or tokens[start] != kind:
            start = opened.pop()
            unclosed[tokens[start]] -= 1
        if kind == "[" and (bar > start or _scheduled(tokens[start + 1 : i][-2:])):
            what = "[a|b] (words in turn)" if bar > start else "[a:b:0.5] (words for some steps)"
            expected = rf"{what} in a form of its own in a picture's prompt, or \[ for the letter"
            checks.fail(name, expected, repr("".join(tokens[start : i + 1])[:60]))
        factors[start] = (
            {"(": STRONGER, "[": 1 / STRONGER}[kind] if len(token) == 1 else float(token[1:-1])
        )
        factors[i] = None
    return factors


def _scheduled(end: Sequence[str]) -> bool:
    """Whether brackets end in a colon and a number."""
    return len(end) == 2 and end[0] == ":" and bool(re.fullmatch(rf"\s*{_NUMBER}\s*", end[1]))


@dataclass(frozen=True)
class Tokens:
    """Token ids and their weights of a batch of prompts, [B, chunks, length].

    Attributes:
        vectors: what stands in the place of a token's embedding, by its three indices.
    """

    ids: Tensor
    weights: Tensor
    vectors: dict[tuple[int, int, int], Tensor]


def tokenize(
    prompts: Sequence[str],
    tokenizer: Any,
    length: int = 77,
    embeddings: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tokens:
    """Prompts as chunks that a text encoder reads, all with the same number of chunks.

    Each chunk is the start token, up to ``length - 2`` tokens of the prompt, the end token and
    padding. A word that doesn't fit into what is left of a chunk begins the next one. A prompt of
    one chunk and no weights has the ids that the tokenizer itself gives it; an empty one, or one
    shorter than the longest, is filled up with empty chunks.

    Args:
        prompts: B texts, weighted as :func:`parse` describes.
        tokenizer: a CLIP tokenizer of ``transformers``.
        length: tokens of a chunk.
        embeddings: vectors [n, C] by the words that stand for them.
    """
    split = [_chunks(prompt, tokenizer, length - 2, embeddings) for prompt in prompts]
    shape = len(split), max(map(len, split)), length
    ids = torch.full(shape, tokenizer.pad_token_id, dtype=torch.int64)
    weights = torch.ones(shape, dtype=torch.float32)
    vectors = {}
    ids[..., 0] = tokenizer.bos_token_id
    ids[..., 1] = tokenizer.eos_token_id
    for i, chunks in enumerate(split):
        for k, chunk in enumerate(chunks):
            ids[i, k, len(chunk) + 1] = tokenizer.eos_token_id
            for j, (token, weight, vector) in enumerate(chunk, 1):
                ids[i, k, j], weights[i, k, j] = token, weight
                if vector is not None:
                    vectors[i, k, j] = vector
    return Tokens(ids, weights, vectors)


def _chunks(
    prompt: str, tokenizer: Any, room: int, embeddings: Mapping[str, Tensor]
) -> list[list[Token]]:
    """The tokens of a prompt, at most ``room`` in a chunk."""
    sections = parse(prompt, embeddings=embeddings)
    words = [_words(section, tokenizer, embeddings) for section in sections]
    return [chunk for section in words for chunk in packed(section, room)]


def packed(words: Iterable[list[Token]], room: int) -> list[list[Token]]:
    """Chunks of at most ``room`` tokens; a word that doesn't fit into one begins the next."""
    chunks: list[list[Token]] = [[]]
    for word in words:
        if len(chunks[-1]) + len(word) > room >= len(word):
            chunks.append([])
        while word:  # one longer than a chunk is cut
            part, word = word[: room - len(chunks[-1])], word[room - len(chunks[-1]) :]
            chunks[-1] += part
            if word:
                chunks.append([])
    return chunks


def _words(
    section: Sequence[Piece], tokenizer: Any, embeddings: Mapping[str, Tensor]
) -> Iterator[list[Token]]:
    """The tokens of each word; id 0 holds the place of a vector."""
    names = sorted(embeddings, key=len, reverse=True)
    found = pattern(names)
    for text, weight in section:
        start = 0
        for match in found.finditer(text):
            yield from plain_words(text[start : match.start()], weight, tokenizer)
            assert match.lastindex is not None
            yield [(0, weight, vector) for vector in embeddings[names[match.lastindex - 1]]]
            start = match.end()
        yield from plain_words(text[start:], weight, tokenizer)


def plain_words(text: str, weight: float, tokenizer: Any) -> Iterator[list[Token]]:
    """The tokens of each word of a text in which brackets are no weights."""
    word: list[Token] = []
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    for one, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        word.append((one, weight, None))
        if token.endswith("</w>"):  # as CLIP marks the end of a word
            yield word
            word = []
    yield word
