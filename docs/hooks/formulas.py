"""Formulas as MathML, written when the site is built: browsers draw it without any script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas drawn."""
    return FORMULA.sub(_drawn, content)


def _drawn(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    math = convert(html.unescape(found["latex"]).strip(), display=display)
    return f'<{found["tag"]} class="formula">{math}</{found["tag"]}>'
