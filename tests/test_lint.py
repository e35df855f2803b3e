"""The linters are part of the tests, so that what lands is clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("csrc", "tests/csrc") for p in sorted((ROOT / folder).rglob("*"))]
CPP = [str(p) for p in SOURCES if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
CLANG_FORMAT = ["-c", "from clang_format import clang_format; clang_format()"]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        [*CLANG_FORMAT, "--dry-run", "--Werror", *CPP],
    ],
    ids=["ruff", "ruff format", "mypy", "clang-format"],
)
def test_clean(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
