r"""Prompts that say something else at some steps, in the syntax of AUTOMATIC1111's web UI.

``[a:b:0.5]`` is a in the first half of the steps and b after it, ``[a:b:5]`` a in the first five
steps; ``[b:5]`` nothing before b, ``[a::5]`` nothing after a; ``[a|b|c]`` is each of them in turn,
another one at every step. A number with a point is a part of all steps, one without counts them.
These may stand inside of each other, and of brackets that change weights. What remains at a step is
a prompt as :mod:`.prompt` reads it.

A bracket without its partner, and one whose inside is none of these, are left as they are, with
all brackets around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..ops import checks

DEEPEST = 100  # brackets inside of each other, around what changes with the steps
_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass(frozen=True)
class _Switch:
    """``[before:after:when]``; ``when`` is a number as it was written."""

    before: Text
    after: Text
    when: str

    def last(self, steps: int) -> int:
        """The last step, counted from 1, that still has ``before``."""
        whole = float(self.when) * (steps if "." in self.when else 1)
        return int(min(max(whole, 0), steps))


@dataclass(frozen=True)
class _Turns:
    """``[a|b|...]``."""

    texts: list[Text]


Text = list["str | _Switch | _Turns"]  # no two strings beside each other


@dataclass
class _Bracket:
    """One that is open: what is in it so far, between the colons and bars in it."""

    opening: str
    parts: list[Text] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def written(self, closing: str = "") -> Text:
        """All of it as it stands there."""
        text: Text = []
        for mark, part in zip([self.opening, *self.marks], self.parts, strict=True):
            _add(text, [mark, *part])
        _add(text, [closing])
        return text

    def closed(self, closing: str) -> Text | None:
        """What it stands for; None where brackets with that inside mean nothing."""
        if self.opening + closing == "()":
            return self.written(closing) if self.marks in ([], [":"]) else None
        if self.opening + closing != "[]":
            return None
        if not self.marks:
            return self.written(closing)
        if set(self.marks) == {"|"}:
            return [_Turns(self.parts)]
        *texts, number = self.parts
        if self.marks not in ([":"], [":", ":"]) or len(number) != 1:
            return None
        found = _NUMBER.fullmatch(number[0]) if isinstance(number[0], str) else None
        before: Text = texts[0] if len(texts) == 2 else []
        return None if found is None else [_Switch(before, texts[-1], found[1])]


def is_edited(prompt: str, name: str = "prompt") -> bool:
    """Whether a prompt changes with the steps. Raises ValueError as :func:`at_steps`."""
    return "[" in prompt and _edited(_read(prompt, name))


def at_steps(prompt: str, steps: int, name: str = "prompt") -> list[str]:
    """What a prompt says at each of ``steps`` steps.

    Args:
        prompt: the text.
        steps: their number.
        name: what to call the prompt in errors.

    Raises:
        ValueError: a bar outside of ``[a|b]`` beside what changes with the steps, with which the
            web UI reads all of it as words; brackets that are too deep.
    """
    text = _read(prompt, name)
    return ["".join(_said(text, step, steps)) for step in range(1, steps + 1)]


def _said(text: Text, step: int, steps: int) -> Iterator[str]:
    for one in text:
        if isinstance(one, str):
            yield one
        elif isinstance(one, _Turns):
            yield from _said(one.texts[(step - 1) % len(one.texts)], step, steps)
        else:
            yield from _said(one.before if step <= one.last(steps) else one.after, step, steps)


def _edited(text: Text) -> bool:
    return any(not isinstance(one, str) for one in text)


def _add(text: Text, more: Iterable[str | _Switch | _Turns]) -> None:
    for one in more:
        last = text[-1] if text else None
        if isinstance(last, str) and isinstance(one, str):
            text[-1] = last + one
        else:
            text.append(one)


def _read(prompt: str, name: str) -> Text:
    outside: Text = []
    opened: list[_Bracket] = []
    bar = False  # whether there is one outside of [a|b]
    for token in _TOKEN.findall(prompt):
        if token in ("(", "["):
            opened.append(_Bracket(token))
        elif token in (":", "|") and opened:
            opened[-1].marks.append(token)
            opened[-1].parts.append([])
        else:
            new: Text = [token]
            if token in (")", "]"):
                closed = opened[-1].closed(token) if opened else None
                if closed is None:  # then those around it mean nothing either
                    bar = _give_up(opened, outside) or bar
                else:
                    new = closed
                    opened.pop()
                    if _edited(new) and len(opened) >= DEEPEST:
                        expected = f"at most {DEEPEST} brackets around each other"
                        checks.fail(name, expected, f"{prompt!r:.60}")
            bar = bar or token == "|"
            _add(opened[-1].parts[-1] if opened else outside, new)
    bar = _give_up(opened, outside) or bar
    if bar and _edited(outside):
        checks.fail(name, "no | but in [a|b] where [a:b:0.5] or [a|b] is used", f"{prompt!r:.60}")
    return outside


def _give_up(opened: list[_Bracket], outside: Text) -> bool:
    """Leave open brackets as they are; whether there was a bar in them."""
    bar = any("|" in bracket.marks for bracket in opened)
    for bracket in opened:
        _add(outside, bracket.written())
    opened.clear()
    return bar
