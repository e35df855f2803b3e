"""A BPE tokenizer of the captions in CLIP's format, and a small text encoder in CLIP's layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_fast.pipelines.tiny_tokenizer import END, START, byte_letters

LENGTH = 24  # tokens of a prompt with start and end
TOKENS = 2000


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of the captions, written as CLIP's files.

    All bytes are tokens, so that words that were never seen can be written too.
    """
    words = Counter(word for caption in captions for word in _words(caption))
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    letters = list(byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    while len(tokens) < TOKENS - 2:
        pairs = Counter[tuple[str, str]]()
        for word, count in words.items():
            for pair in zip(parts[word], parts[word][1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        (left, right), count = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if count < 2:
            break
        merges.append((left, right))
        tokens.append(left + right)
        for symbols in parts.values():
            for i in reversed(range(len(symbols) - 1)):
                if symbols[i : i + 2] == [left, right]:
                    symbols[i : i + 2] = [left + right]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate([*tokens, START, END])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    return CLIPTokenizer.from_pretrained(folder)


def _words(caption: str) -> list[str]:
    """What CLIP's tokenizer cuts a text into before the merges, in letters of bytes."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    letters = byte_letters()
    words = (word for word, _ in split.pre_tokenize_str(caption.lower()))
    return ["".join(letters[byte] for byte in word.encode()) for word in words]


def make_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModel:
    """A text encoder in CLIP's layout with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 [N, 24]."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
