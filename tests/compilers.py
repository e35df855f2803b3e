"""Marks of tests that run a compiler for longer than a newcomer would wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from diffusion_fast.ops.cuda import build as extension


def needs_nvcc(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that builds with nvcc; it is skipped where there is none."""
    absent = extension.find_nvcc() is None
    skip = pytest.mark.skipif(absent, reason="needs nvcc (the CUDA toolkit)")
    return pytest.mark.compiles(skip(test))
