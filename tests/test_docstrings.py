"""Every public item has an example in its docstring, and all of them run."""

from __future__ import annotations

import doctest
import inspect
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import diffusion_fast as df

MODULES = ("integrations", "ops")
PUBLIC = [name for name in df.__all__ if name not in MODULES and not name.startswith("__")]
OPS = [f"ops.{name}" for name in df.ops.__all__ if callable(getattr(df.ops, name))]


@pytest.mark.parametrize("name", PUBLIC + OPS)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(attrgetter(name)(df)) or ""
    test = doctest.DocTestParser().get_doctest(text, {"df": df, "torch": torch}, name, None, None)
    assert test.examples, f"{name}: its docstring has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
