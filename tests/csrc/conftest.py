"""Which of these tests wait for `-m compiles`: all but head dim 40 in bf16 is built there."""

from __future__ import annotations

import pytest
import torch

BUILT_FIRST = {"head_dim": 40, "dtype": torch.bfloat16}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        others = (parameters.get(name, first) != first for name, first in BUILT_FIRST.items())
        if item.path.parent.name == "csrc" and any(others):
            item.add_marker(pytest.mark.compiles)
