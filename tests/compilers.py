"""Marks of tests that run a compiler, or what one has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from diffusion_fast.ops.cpu import library as cpu
from diffusion_fast.ops.cuda import build as extension

needs_cpu_kernels = pytest.mark.skipif(
    bool(cpu.machine()), reason=f"needs the kernels for CPUs: {'; '.join(cpu.machine())}"
)


def needs_nvcc(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that builds with nvcc; it is skipped where there is none."""
    absent = extension.find_nvcc() is None
    skip = pytest.mark.skipif(absent, reason="needs nvcc (the CUDA toolkit)")
    return pytest.mark.compiles(skip(test))
