"""Weights in prompts, and long prompts in chunks."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import deadline, survives

from diffusion_fast.models.prompt import parse, tokenize

UP, DOWN = 1.1, 1 / 1.1
CLOSE = {"(": ")", "[": "]"}


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
        ("(cat:5e-1)(dog:1x5)", [("cat", 0.5), ("dog:1x5", UP)]),
        ("a) b] (c [d", [("a) b] (c [d", 1)]),
        ("(a [b) c", [("a [b", UP), (" c", 1)]),
        (":1.3) \\n", [(":1.3) \\n", 1)]),
    ],
)
def test_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    [found] = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [w for _, w in found] == pytest.approx([w for _, w in pieces])


def escaped(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


@given(st.text(alphabet="ab ()[]\\:1.5,|", max_size=30))
def test_any_text_is_a_prompt_or_refused(prompt: str) -> None:
    found = survives(lambda: parse(prompt)[0], (ValueError,), ["prompt: expected "], prompt)
    if found is not None:
        assert all(text for text, _ in found)
        assert all(a != b for (_, a), (_, b) in itertools.pairwise(found))
    if not re.search(r"\)(\d*\.\d+)", prompt):
        assert parse(escaped(prompt)) == [[(prompt, 1.0)] if prompt else []]


@st.composite
def written(draw: st.DrawFn, depth: int = 3) -> tuple[str, list[tuple[str, float]]]:
    """A prompt, and the weights of its words."""
    kinds = ("(", "[", ":", "", "") if depth else ("",)
    text, words = "", []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(kinds))
        if not kind:
            word = draw(st.text(alphabet="abc()[]\\,é", min_size=1, max_size=4))
            text += f"{escaped(word)} "
            words.append((word, 1.0))
            continue
        inner, inside = draw(written(depth=depth - 1))
        factor = draw(st.sampled_from([0.0, 0.5, 1.2, -1.5])) if kind == ":" else UP
        text += f"({inner}: {factor})" if kind == ":" else f"{kind}{inner}{CLOSE[kind]}"
        words += [(w, x * (1 / UP if kind == "[" else factor)) for w, x in inside]
    return text, words


@given(written())
def test_nested_weights_multiply(case: tuple[str, list[tuple[str, float]]]) -> None:
    prompt, words = case
    [pieces] = parse(prompt)
    found = [(word, weight) for text, weight in pieces for word in text.split()]
    assert [word for word, _ in found] == [word for word, _ in words]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in words])


def test_sections() -> None:
    assert parse("a BREAK b") == [[("a ", 1.0)], [(" b", 1.0)]]
    assert parse("BREAKS aBREAK break BRE(AK:1)") == [[("BREAKS aBREAK break BREAK", 1.0)]]
    assert parse("(a BREAK b:2)BREAK") == [[("a ", 2.0)], [(" b", 2.0)], []]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [cat:dog:0.5]", r"\[a:b:0.5\].* got '\[cat:dog:0.5\]'"),
        ("[cat:10]", r"\[a:b:0.5\]"),
        ("[(cat:1.2) b :: .5 ]", r"\[a:b:0.5\]"),
        ("[a:1e1]", r"\[a:b:0.5\]"),
        ("x (a [cat|dog] b)", r"\[a\|b\] .*got '\[cat\|dog\]'"),
        ("[a (b [c|]:1.2)]", r"\[a\|b\]"),
        ("a cat AND a dog :0.5", "expected none of .*'and'.* got 'AND'"),
        ("a <lora:style:0.8>", "pipe.loras.load.* got '<lora:style:0.8>'"),
        ("<LyCo:x>", "pipe.loras.load"),
        ("(embedding:bad-hands:1.2)", "embedding"),
        ("{a|b} cat", "write one of them"),
        ('("a", "b").blend(0.5, 0.5)', "not composed"),
        ("a (cat)1.3, b", r"written \(word:1.3\)"),
        ("(cat)++", r"written \(word:1.3\)"),
        (f"(cat:{'9' * 42})", "weights of at most 1000, got 1e"),
        ("(cat:1e400)", "weights of at most 1000, got inf"),
        ("(cat:1e4)", "weights of at most 1000, got 10000"),
        ("(cat:NaN)", "weights of at most 1000, got nan"),
        ("[a (cat: -inf )]", "weights of at most 1000, got -inf"),
        ("((a:900):1.2)", "weights of at most 1000, got 1080"),
        ("(" * 100 + "a" + ")" * 100, "weights of at most 1000"),
        ("a \ud83d", "text that UTF-8 can hold"),
    ],
)
def test_what_is_not_read_is_named(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"negative_prompt: {message}|prompt: .*{message}"):
        parse(prompt)


@pytest.mark.parametrize(
    "prompt",
    ["[a: cat]", "a | b", r"\[cat:dog:0.5\] \[a|b\]", "sand AND_x LAND", "a < lora > b", "{cat}"],
)
def test_what_is_words_is_read_as_words(prompt: str) -> None:
    assert len(parse(prompt)[0]) == 1


@pytest.mark.parametrize(
    "prompt",
    ["(" * 50_000, "(" * 50_000 + "]" * 50_000, "[a" * 20_000 + ":" * 20_000, ":1" * 50_000],
)
def test_long_prompts_take_no_time_to_speak_of(prompt: str) -> None:
    with deadline(10):
        assert len(parse(prompt)[0]) == 1


class Letters:
    """A tokenizer with a token for each letter; small ones end a word."""

    bos_token_id, eos_token_id, pad_token_id = 1000, 1001, 7

    def __call__(self, text: str, **_: object) -> object:
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(one) + "</w>" * chr(one).islower() for one in ids]


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


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("abXYzc", ["ab", "XYzc"]),
        ("abcXyd", ["abc", "Xyd"]),
        ("aVWXYZb", ["aVWX", "YZb"]),
        ("abcd BREAK e".replace(" ", ""), ["abcd", "BREA", "Ke"]),
        ("a(b:1) BREAK BREAK c", ["ab ", " ", " c"]),
        ("abX", ["abX"]),
    ],
)
def test_words_are_whole(prompt: str, chunks: list[str]) -> None:
    ids = tokenize([prompt], Letters(), length=6).ids[0]
    found = ["".join(chr(one) for one in row if one not in (1000, 1001, 7)) for row in ids.tolist()]
    assert found == chunks


@pytest.mark.parametrize(("letters", "chunks"), [(0, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_how_many_chunks(letters: int, chunks: int) -> None:
    assert tokenize(["a" * letters], Letters(), length=6).ids.shape == (1, chunks, 6)
