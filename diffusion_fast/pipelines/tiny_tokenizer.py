"""A small tokenizer in CLIP's format: all bytes, and a few common words as one token each."""

from __future__ import annotations

from pathlib import Path

from ..files import write_json

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
WORDS = """
a an the of in on at and with by to photo picture painting drawing image cat dog bird horse man
woman child person house tree mountain river sea sky cloud street city car boat flower red green
blue yellow black white old new big small bright dark beautiful
"""


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Token ids and merges; the last two ids are those of start and end."""
    letters = list(byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        while len(parts := _split(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
            tokens.append(parts[0] + parts[1])
    tokens += [START, END]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(merge) for merge in merges]


def write_tokenizer(folder: Path, pad: str = END) -> int:
    """Write a tokenizer's folder that ``transformers`` loads; returns the number of tokens."""
    ids, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(ids, folder / "vocab.json")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(special, folder / "special_tokens_map.json")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True}
    write_json(config | special, folder / "tokenizer_config.json")
    return len(ids)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """A word's tokens: the earliest merge that fits is made first (BPE, Sennrich et al. 2016)."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    for left, right in merges:
        for i in reversed(range(len(parts) - 1)):
            if parts[i : i + 2] == [left, right]:
                parts[i : i + 2] = [left + right]
    return parts


def byte_letters() -> str:
    """A printable character for each byte (byte-level BPE, Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (256 + i for i in range(256 - len(printable)))
    return "".join(chr(b) if b in printable else chr(next(others)) for b in range(256))
