"""Kernel tests: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("set TRITON_INTERPRET=1: triton was imported before tests/kernels")
    # The interpreter is chosen when triton is imported. Nothing else in this process compiles
    # Triton code, as there is no GPU; ahead-of-time compilation runs in a process of its own.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty hands out NaN, so that an element that no program wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning results of tests stay with the tests."""
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
