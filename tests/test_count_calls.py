"""What the project's own counts count."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.tools.count_calls import Calls, sources, statements
from diffusion_fast import ops


def test_docstrings_are_no_statements(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text('"""Doc."""\nimport os\n\ndef f():\n    """Doc."""\n    return os\n')
    assert statements(path) == 3  # the import, the function and its return


def test_calls_of_the_project_are_counted_and_no_others() -> None:
    calls, x = Calls(), torch.randn(2, 4)
    before = sys.getprofile()
    sys.setprofile(calls)
    try:
        ops.geglu(x)
        ops.geglu(x)
        torch.nn.functional.gelu(x)
    finally:
        sys.setprofile(before)
    counts = {f"{file}:{name}": count for (file, name), count in calls.by_place.items()}
    assert counts["diffusion_fast/ops/geglu.py:geglu"] == 2
    assert all(name.startswith("diffusion_fast/") for name in counts)
    assert not calls.way  # there was no step


def test_files_are_found() -> None:
    names = {path.name for path in sources("diffusion_fast", "kernels")}
    assert {"engine.py", "sampler_step.py", "__init__.py"} <= names
