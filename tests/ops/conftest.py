"""Tests of ops change what machines answer: nothing found before a test counts in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffusion_fast.ops.dispatch import known_ops


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    for op in known_ops.values():
        op.forget()
    yield
    for op in known_ops.values():
        op.forget()
