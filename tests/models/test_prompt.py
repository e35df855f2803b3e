"""Weights in prompts, and long prompts in chunks."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_fast.models.prompt import parse, tokenize

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("()", []),
        ("a cat", [("a cat", 1)]),
        ("a (cat:1.3) here", [("a ", 1), ("cat", 1.3), (" here", 1)]),
        ("(cat) [dog]", [("cat", UP), (" ", 1), ("dog", DOWN)]),
        ("((cat))", [("cat", UP * UP)]),
        ("(red (cat:2), [dog]:1.5)", [("red ", 1.5), ("cat", 3), (", ", 1.5), ("dog", 1.5 * DOWN)]),
        ("(cat:.5)(cat: 2. )(cat:-1)", [("cat", 0.5), ("cat", 2), ("cat", -1)]),
        (r"\(cat\) \[a\] \\", [(r"(cat) [a] " + "\\", 1)]),
        (r"(a\):2)", [("a)", 2)]),
        ("a: b (c:d)", [("a: b ", 1), ("c:d", UP)]),
        ("(cat:1e5)", [("cat:1e5", UP)]),
        ("a) b] (c [d", [("a) b] (c [d", 1)]),
        ("(a [b) c", [("a [b", UP), (" c", 1)]),
        (":1.3) \\n", [(":1.3) \\n", 1)]),
    ],
)
def test_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [w for _, w in found] == pytest.approx([w for _, w in pieces])


@given(st.text(alphabet="ab ()[]\\:1.5,", max_size=30))
def test_any_text_is_a_prompt(prompt: str) -> None:
    found = parse(prompt)
    assert all(text for text, _ in found)
    weights = [weight for _, weight in found]
    assert all(a != b for a, b in itertools.pairwise(weights))
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", prompt)
    assert parse(escaped) == ([(prompt, 1.0)] if prompt else [])


class Letters:
    """A tokenizer with a token for each letter."""

    bos_token_id, eos_token_id, pad_token_id = 1000, 1001, 7

    def __call__(self, text: str, **_: object) -> object:
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def test_chunks() -> None:
    tokens = tokenize(["", "abcd(ef:2)g", "xyz"], Letters(), length=6)
    start, end, pad = 1000, 1001, 7
    a, x = ord("a"), ord("x")
    assert tokens.ids.tolist() == [
        [[start, end, pad, pad, pad, pad]] * 2,
        [[start, a, a + 1, a + 2, a + 3, end], [start, a + 4, a + 5, a + 6, end, pad]],
        [[start, x, x + 1, x + 2, end, pad], [start, end, pad, pad, pad, pad]],
    ]
    weights = torch.ones(3, 2, 6)
    weights[1, 1, 1:3] = 2
    assert torch.equal(tokens.weights, weights)


@pytest.mark.parametrize(("letters", "chunks"), [(0, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_how_many_chunks(letters: int, chunks: int) -> None:
    assert tokenize(["a" * letters], Letters(), length=6).ids.shape == (1, chunks, 6)
