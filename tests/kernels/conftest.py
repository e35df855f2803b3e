"""Kernel tests: on a GPU where there is one, else in Triton's interpreter on the CPU.

Which of them is chosen when triton is imported, so tests/conftest.py says it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
