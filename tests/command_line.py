"""The command line as its users meet it, for tests."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from diffusion_fast.cli import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """The command line in this process, with its own arguments and streams."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["diffusion-fast", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
