"""Prompts that change with the steps: what they say, in the forms of the web UI."""

from __future__ import annotations

import re
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import deadline, survives

from diffusion_fast.models.prompt_edits import at_steps, is_edited


def spans(prompt: str, steps: int = 10) -> list[tuple[int, str]]:
    """The last step of each text, counted from 1."""
    ends, last = [], 0
    for text, group in groupby(at_steps(prompt, steps)):
        last += len(list(group))
        ends.append((last, text))
    return ends


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [b:c:3] d", [(3, "a b d"), (10, "a c d")]),
        ("a [b:c:0.5]", [(5, "a b"), (10, "a c")]),
        ("a [b:c:.25]", [(2, "a b"), (10, "a c")]),
        ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
        ("a [:b:3]", [(3, "a "), (10, "a b")]),
        ("[a::3] b", [(3, "a b"), (10, " b")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:10]", [(10, "a")]),
        ("[a:b:1e400]", [(10, "a")]),
        ("[a:b:1.5]", [(10, "a")]),
        ("[a:b:1e0]", [(1, "a"), (10, "b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("([a:b:3]:1.2)", [(3, "(a:1.2)"), (10, "(b:1.2)")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("[[a|b]:c:2]", [(1, "a"), (2, "b"), (10, "c")]),
        ("[a:b:c:d:2]", [(10, "[a:b:c:d:2]")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        (r"\[a:b:3\] [c\:d:e:3]", [(3, r"\[a:b:3\] c\:d"), (10, r"\[a:b:3\] e")]),
        ("a | b", [(10, "a | b")]),
        ("[x:\n3\n]", [(3, ""), (10, "x")]),
    ],
)
def test_what_is_said_until_when(prompt: str, expected: list[tuple[int, str]]) -> None:
    assert spans(prompt) == expected
    assert is_edited(prompt) or len(expected) == 1


def test_turns() -> None:
    assert at_steps("[a|(b:1.1)]", 4) == ["a", "(b:1.1)"] * 2
    assert at_steps("[fe|]male", 3) == ["female", "male", "female"]
    assert at_steps("[fe|||]male", 5) == ["female", "male", "male", "male", "female"]
    assert at_steps("[a|b][c|d|e]", 6) == ["ac", "bd", "ae", "bc", "ad", "be"]


def test_what_the_web_ui_reads_as_words_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"negative_prompt: expected no \| but in \[a\|b\]"):
        at_steps("a | [b:3]", 10, "negative_prompt")
    with pytest.raises(ValueError, match="prompt: expected at most 100 brackets"):
        is_edited("[" * 200 + "a" + ":1]" * 200)


@given(st.text(alphabet="ab []():|\\.5", max_size=25), st.integers(1, 6))
def test_any_text_says_something_or_is_refused(prompt: str, steps: int) -> None:
    said = survives(lambda: at_steps(prompt, steps), (ValueError,), ["prompt: expected "], prompt)
    if said is not None:
        assert len(said) == steps
        if not is_edited(prompt):
            assert said == [prompt] * steps
    assert at_steps(re.sub(r"([\\\[])", r"\\\1", prompt), 1) != [""] or not prompt


@pytest.mark.parametrize("prompt", ["(" * 50_000, "[" * 9_000 + "]" * 9_000, "[a:" * 30_000])
def test_long_prompts_take_no_time_to_speak_of(prompt: str) -> None:
    with deadline(10):
        assert at_steps(prompt, 1) == [prompt]
